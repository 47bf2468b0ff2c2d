"""Device functions that turn words of the planes layout into planes of floats.

Every decoder has two forms with one meaning: inline PTX on register pairs (`pack=2`: an output register holds the
values of two neighbouring words, so 16-bit pairs never need repacking) and plain Triton, for the interpreter and for
GPUs without the instructions. The counts of integer instructions: int4 1.25 a weight, int8, fp8 and fp4 1.5.

The PTX uses fma instead of add, sub and mul: those have 16-bit pair forms only from sm_90 on, fma from sm_80 on.
"""

import triton
import triton.language as tl


def _asm(body: str, outputs: int) -> tl.constexpr:
    """A PTX block which first gathers the low halves of words $n and $n+1 into t, and the high halves into u."""
    gather = f"prmt.b32 t, ${outputs}, ${outputs + 1}, 0x5410; prmt.b32 u, ${outputs}, ${outputs + 1}, 0x7632;"
    return tl.constexpr("{ .reg .b32 t, u, a, b, c; " + gather + body + "}")


def _constraints(outputs: int) -> tl.constexpr:
    return tl.constexpr(",".join(["=&r"] * outputs + ["r", "r"]))


def _int4_body(kind: str, magic: int, centre: int | None) -> str:
    """Nibble i of a half is (half >> 4i) & 15; OR-ed under an exponent where the last mantissa bit is 1."""
    lines = []
    one = {"bf16x2": 0x3F803F80, "f16x2": 0x3C003C00}[kind]
    for i in range(8):
        half = "t" if i < 4 else "u"
        if i % 4:
            lines.append(f"shr.u32 a, {half}, {4 * (i % 4)};")
        lines.append(f"lop3.b32 ${i}, {'a' if i % 4 else half}, 0x000F000F, {magic:#x}, 0xEA;")
        if centre is not None:
            lines.append(f"mov.b32 b, {one:#x}; mov.b32 c, {centre:#x}; fma.rn.{kind} ${i}, ${i}, b, c;")
    return " ".join(lines)


def _int8_bf16_body() -> str:
    """Low 7 bits under 128, and -128 or -256 by the sign bit: their sum is the signed byte."""
    lines = ["mov.b32 c, 0x3F803F80;"]
    for i in range(4):
        half = "t" if i < 2 else "u"
        if i % 2:
            lines.append(f"shr.u32 {half}, {half}, 8;")
        lines.append(
            f"lop3.b32 a, {half}, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, {half}, 0x00800080, 0xC300C300, 0xEA;"
        )
        lines.append(f"fma.rn.bf16x2 ${i}, a, c, b;")
    return " ".join(lines)


def _int8_f16_body() -> str:
    """The byte with its sign bit flipped is value + 128; under 1024 that is exact in float16."""
    lines = ["mov.b32 b, 0x3C003C00; mov.b32 c, 0xE480E480;"]
    for i in range(4):
        half = "t" if i < 2 else "u"
        if i % 2:
            lines.append(f"shr.u32 {half}, {half}, 8;")
        lines.append(f"lop3.b32 a, {half}, 0x00FF00FF, 0x64806480, 0x6A; fma.rn.f16x2 ${i}, a, b, c;")
    return " ".join(lines)


def _fp8_bf16_body() -> str:
    """Code 0 of a half lies in place, code 1 is put together from two shifts; * 2**120 sets the exponent right."""
    lines = ["mov.b32 b, 0x7B807B80; mov.b32 c, 0x80008000;"]
    for i, half in ((0, "t"), (2, "u")):
        lines.append(f"and.b32 ${i}, {half}, 0x87F087F0; fma.rn.bf16x2 ${i}, ${i}, b, c;")
        lines.append(f"shl.b32 ${i + 1}, {half}, 4; and.b32 ${i + 1}, ${i + 1}, 0x80F080F0; shr.u32 a, {half}, 4;")
        lines.append(f"lop3.b32 ${i + 1}, a, 0x07000700, ${i + 1}, 0xEA; fma.rn.bf16x2 ${i + 1}, ${i + 1}, b, c;")
    return " ".join(lines)


def _fp4_bf16_body() -> str:
    """Codes 0 to 2 of a half are one shift and one AND, code 3 takes what bits were left. No multiplication."""
    lines = []
    for i, half in ((0, "t"), (4, "u")):
        lines.append(f"and.b32 ${i}, {half}, 0x81C081C0;")
        lines.append(f"shl.b32 a, {half}, 3; and.b32 ${i + 1}, a, 0x81C081C0;")
        lines.append(f"shl.b32 a, {half}, 6; and.b32 ${i + 2}, a, 0x81C081C0;")
        lines.append(f"shl.b32 a, {half}, 1; and.b32 ${i + 3}, a, 0x80008000; shr.u32 a, {half}, 5;")
        lines.append(f"lop3.b32 ${i + 3}, a, 0x01000100, ${i + 3}, 0xEA; shr.u32 a, {half}, 4;")
        lines.append(f"lop3.b32 ${i + 3}, a, 0x00C000C0, ${i + 3}, 0xEA;")
    return " ".join(lines)


INT4_BF16 = _asm(_int4_body("bf16x2", 0x43004300, None), 8)
INT4_BF16_CENTRED = _asm(_int4_body("bf16x2", 0x43004300, 0xC308C308), 8)
INT4_F16 = _asm(_int4_body("f16x2", 0x64006400, None), 8)
INT4_F16_CENTRED = _asm(_int4_body("f16x2", 0x64006400, 0xE408E408), 8)
INT8_BF16 = _asm(_int8_bf16_body(), 4)
INT8_F16 = _asm(_int8_f16_body(), 4)
FP8_BF16 = _asm(_fp8_bf16_body(), 4)
FP4_BF16 = _asm(_fp4_bf16_body(), 8)
FOUR, EIGHT = _constraints(4), _constraints(8)

SUB_BF16 = tl.constexpr("{ .reg .b32 b; mov.b32 b, 0xBF80BF80; fma.rn.bf16x2 $0, $2, b, $1; }")
SUB_F16 = tl.constexpr("{ .reg .b32 b; mov.b32 b, 0xBC00BC00; fma.rn.f16x2 $0, $2, b, $1; }")
MUL_BF16 = tl.constexpr("{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c; }")
MUL_F16 = tl.constexpr("{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.f16x2 $0, $1, $2, c; }")
FP4_ASM_FACTOR = tl.constexpr(2.0**117)  # of the scales that FP4_BF16's planes meet; 2**9 is left for the sums


@triton.jit
def plane_sub(plane, zero, ASM: tl.constexpr, CDT: tl.constexpr):
    """plane - zero, in pairs."""
    if ASM:
        z = tl.broadcast_to(zero, plane.shape)
        if tl.bfloat16 == CDT:
            return tl.inline_asm_elementwise(SUB_BF16, "=r,r,r", [plane, z], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(SUB_F16, "=r,r,r", [plane, z], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return plane - zero


@triton.jit
def round_float32(value, DT: tl.constexpr, CDT: tl.constexpr):
    """float32 rounded to DT, halves to even; still float32 in the interpreter (CDT), which truncates to bfloat16."""
    if tl.float32 == DT:
        return value
    elif tl.float32 != CDT:
        return value.to(DT)
    elif tl.bfloat16 == DT:
        b = value.to(tl.int32, bitcast=True)
        return ((b + 0x7FFF + ((b >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return value.to(DT).to(tl.float32)


@triton.jit
def plane_mul(plane, scale, ASM: tl.constexpr, CDT: tl.constexpr, DT: tl.constexpr, SDT: tl.constexpr):
    """plane * scale, rounded to the scales' dtype SDT, then to DT; in pairs where both are the dtype computed in."""
    if SDT != DT or CDT != DT:
        product = plane.to(tl.float32) * scale.to(tl.float32)
        product = round_float32(product, SDT, CDT).to(tl.float32)
        return round_float32(product, DT, CDT)
    elif ASM:
        s = tl.broadcast_to(scale, plane.shape)
        if tl.bfloat16 == CDT:
            return tl.inline_asm_elementwise(MUL_BF16, "=r,r,r", [plane, s], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(MUL_F16, "=r,r,r", [plane, s], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return plane * scale


@triton.jit
def int4_planes(q, OFFSET: tl.constexpr, ASM: tl.constexpr, CDT: tl.constexpr):
    """8 planes of codes + OFFSET, which is -8, or 128 (1024 in float16) when zero points are still to be subtracted."""
    if ASM:
        if tl.bfloat16 == CDT:
            if OFFSET == -8:
                planes = tl.inline_asm_elementwise(
                    INT4_BF16_CENTRED, EIGHT, [q], (tl.bfloat16,) * 8, is_pure=True, pack=2
                )
            else:
                planes = tl.inline_asm_elementwise(INT4_BF16, EIGHT, [q], (tl.bfloat16,) * 8, is_pure=True, pack=2)
        else:
            if OFFSET == -8:
                planes = tl.inline_asm_elementwise(
                    INT4_F16_CENTRED, EIGHT, [q], (tl.float16,) * 8, is_pure=True, pack=2
                )
            else:
                planes = tl.inline_asm_elementwise(INT4_F16, EIGHT, [q], (tl.float16,) * 8, is_pure=True, pack=2)
        return planes
    else:
        return (
            ((q & 15) + OFFSET).to(CDT),
            (((q >> 4) & 15) + OFFSET).to(CDT),
            (((q >> 8) & 15) + OFFSET).to(CDT),
            (((q >> 12) & 15) + OFFSET).to(CDT),
            (((q >> 16) & 15) + OFFSET).to(CDT),
            (((q >> 20) & 15) + OFFSET).to(CDT),
            (((q >> 24) & 15) + OFFSET).to(CDT),
            (((q >> 28) & 15) + OFFSET).to(CDT),
        )


@triton.jit
def int8_planes(q, ASM: tl.constexpr, CDT: tl.constexpr):
    """4 planes of signed bytes."""
    if ASM:
        if tl.bfloat16 == CDT:
            planes = tl.inline_asm_elementwise(INT8_BF16, FOUR, [q], (tl.bfloat16,) * 4, is_pure=True, pack=2)
        else:
            planes = tl.inline_asm_elementwise(INT8_F16, FOUR, [q], (tl.float16,) * 4, is_pure=True, pack=2)
        return planes
    else:
        return ((q << 24) >> 24).to(CDT), ((q << 16) >> 24).to(CDT), ((q << 8) >> 24).to(CDT), (q >> 24).to(CDT)


@triton.jit
def e4m3_value(sign, magnitude, CDT: tl.constexpr):
    """The value of an e4m3 code from its sign bit and its 7 other bits: below 8 subnormal, else as float32 bits."""
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where(sign != 0, -value, value).to(CDT)


@triton.jit
def fp8_planes(q, ASM: tl.constexpr, CDT: tl.constexpr):
    """4 planes of e4m3 values."""
    if ASM and tl.bfloat16 == CDT:
        return tl.inline_asm_elementwise(FP8_BF16, FOUR, [q], (tl.bfloat16,) * 4, is_pure=True, pack=2)
    else:
        return (
            e4m3_value((q >> 15) & 1, (q >> 4) & 127, CDT),
            e4m3_value((q >> 11) & 1, (q & 15) | ((q >> 8) & 112), CDT),
            e4m3_value((q >> 31) & 1, (q >> 20) & 127, CDT),
            e4m3_value((q >> 27) & 1, ((q >> 16) & 15) | ((q >> 24) & 112), CDT),
        )


@triton.jit
def e2m1_value(sign, magnitude, CDT: tl.constexpr):
    """0, .5, 1, 1.5, 2, 3, 4, 6 by the low three bits, negative where the fourth is set."""
    exponent = magnitude >> 1
    mantissa = magnitude & 1
    doubled = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
    return (tl.where(sign != 0, -doubled, doubled).to(tl.float32) * 0.5).to(CDT)


@triton.jit
def _fp4_half(h, CDT: tl.constexpr):
    """The four codes in the low 16 bits."""
    last = ((h >> 10) & 3) | ((h >> 11) & 4)
    return (
        e2m1_value((h >> 15) & 1, (h >> 6) & 7, CDT),
        e2m1_value((h >> 12) & 1, (h >> 3) & 7, CDT),
        e2m1_value((h >> 9) & 1, h & 7, CDT),
        e2m1_value((h >> 14) & 1, last, CDT),
    )


@triton.jit
def fp4_planes(q, ASM: tl.constexpr, CDT: tl.constexpr):
    """8 planes of e2m1 values; by the PTX (bfloat16 only) times 2**-126, see FP4_ASM_FACTOR."""
    if ASM and tl.bfloat16 == CDT:
        return tl.inline_asm_elementwise(FP4_BF16, EIGHT, [q], (tl.bfloat16,) * 8, is_pure=True, pack=2)
    else:
        a, b, c, d = _fp4_half(q, CDT)
        e, f, g, h = _fp4_half(q >> 16, CDT)
        return a, b, c, d, e, f, g, h


@triton.jit
def join4(a0, a1, a2, a3, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Four [ROWS, COLS / 4] planes side by side."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3)).permute(0, 2, 3, 1).reshape(ROWS, COLS)


@triton.jit
def join8(a0, a1, a2, a3, a4, a5, a6, a7, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Eight [ROWS, COLS / 8] planes side by side."""
    even = tl.join(tl.join(a0, a4), tl.join(a2, a6))
    odd = tl.join(tl.join(a1, a5), tl.join(a3, a7))
    return tl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(ROWS, COLS)


# KV caches hold plain bytes, four neighbouring ones to a register (pack=4); the values of two share a register.
KV_INT4_BF16 = tl.constexpr(
    "{ .reg .b32 t, u, b, c; mov.b32 b, 0x3F803F80; mov.b32 c, 0xC300C300;"
    "prmt.b32 t, $4, 0, 0x4140; prmt.b32 u, $4, 0, 0x4342;"
    "lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA; lop3.b32 $1, u, 0x000F000F, 0x43004300, 0xEA;"
    "shr.u32 t, t, 4; shr.u32 u, u, 4;"
    "lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA; lop3.b32 $3, u, 0x000F000F, 0x43004300, 0xEA;"
    "fma.rn.bf16x2 $0, $0, b, c; fma.rn.bf16x2 $1, $1, b, c; fma.rn.bf16x2 $2, $2, b, c; fma.rn.bf16x2 $3, $3, b, c; }"
)
KV_INT8_BF16 = tl.constexpr(
    "{ .reg .b32 t, u, a, b, c; mov.b32 c, 0x3F803F80; prmt.b32 t, $2, 0, 0x4140; prmt.b32 u, $2, 0, 0x4342;"
    "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0xC300C300, 0xEA;"
    "fma.rn.bf16x2 $0, a, c, b;"
    "lop3.b32 a, u, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, u, 0x00800080, 0xC300C300, 0xEA;"
    "fma.rn.bf16x2 $1, a, c, b; }"
)
KV_FP8_BF16 = tl.constexpr(
    "{ .reg .b32 t, u, a, b, c; mov.b32 b, 0x7B807B80; mov.b32 c, 0x80008000;"
    "prmt.b32 t, $2, 0, 0x1404; prmt.b32 u, $2, 0, 0x3424;"
    "shr.u32 a, t, 4; and.b32 a, a, 0x07F007F0; lop3.b32 a, t, 0x80008000, a, 0xEA; fma.rn.bf16x2 $0, a, b, c;"
    "shr.u32 a, u, 4; and.b32 a, a, 0x07F007F0; lop3.b32 a, u, 0x80008000, a, 0xEA; fma.rn.bf16x2 $1, a, b, c; }"
)


@triton.jit
def kv_int4(byte, ASM: tl.constexpr, CDT: tl.constexpr):
    """(low nibbles, high nibbles) of uint8, as floats 0 .. 15."""
    if ASM and tl.bfloat16 == CDT:
        return tl.inline_asm_elementwise(
            KV_INT4_BF16, "=&r,=&r,=&r,=&r,r", [byte], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return (byte & 15).to(CDT), (byte >> 4).to(CDT)


@triton.jit
def kv_int8(byte, ASM: tl.constexpr, CDT: tl.constexpr):
    """The signed values of uint8 that hold int8's bits."""
    if ASM and tl.bfloat16 == CDT:
        return tl.inline_asm_elementwise(KV_INT8_BF16, "=&r,=&r,r", [byte], tl.bfloat16, is_pure=True, pack=4)
    else:
        return byte.to(tl.int8, bitcast=True).to(CDT)


@triton.jit
def kv_fp8(byte, ASM: tl.constexpr, CDT: tl.constexpr):
    """The values of uint8 that hold e4m3's bits."""
    if ASM and tl.bfloat16 == CDT:
        return tl.inline_asm_elementwise(KV_FP8_BF16, "=&r,=&r,r", [byte], tl.bfloat16, is_pure=True, pack=4)
    else:
        wide = byte.to(tl.int32)
        return e4m3_value(wide >> 7, wide & 127, CDT)
