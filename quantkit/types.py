"""Core data types: number formats, and QuantizedWeight, which grids, algorithms and formats exchange.

N = out features, K = in features, G = groups of a row = ceil(K / group_size).
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quantkit.errors import UserError
from quantkit.ggml_types import GGML_TYPES, QUANTIZED

if TYPE_CHECKING:
    from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0  # largest finite values of float8 e4m3fn and of float4 e2m1
BLOCK = 128  # rows and columns of the fp8 blocks engines have kernels for


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The number format of a weight: what its elements are, and which of them share a scale.

    bits        of a code
    group_size  columns of a row that share a scale; -1 all of them ("channel")
    symmetric   no zero point is stored; always so for floats
    element     "int": 0 .. 2**bits - 1 minus a zero point; "float": e4m3 (8 bits) or e2m1 (4 bits); "block": as the
                GGUF type `block_type` says, whose blocks have group_size columns (`block_spec` makes these)
    scale_format  of a scale: "float" (a plain one), "e4m3" (times one global scale), "e8m0" (a power of two)
    scale_rows    rows that share a scale: 1, BLOCK (blocks, the last ones may be cut short), or -1: the whole tensor
    """

    bits: int
    group_size: int
    symmetric: bool = True
    element: Literal["int", "float", "block"] = "int"
    scale_format: Literal["float", "e4m3", "e8m0"] = "float"
    scale_rows: int = 1
    block_type: str = ""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits must be 2 to 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size must be positive or -1 (channel), got {self.group_size}")
        if self.element == "float" and (self.bits not in (4, 8) or not self.symmetric):
            raise UserError(f"floats have 4 or 8 bits and no zero point, got {self.bits} bits")
        if self.scale_rows not in (1, BLOCK, -1) or (self.scale_rows == BLOCK and self.group_size != BLOCK):
            raise UserError(
                f"a scale is for one row, for {BLOCK} x {BLOCK} elements or for all, got {self.scale_rows} rows"
            )
        if self.scale_rows == -1 and self.group_size != -1:
            raise UserError("one scale for the tensor leaves no groups in a row")

    def groups(self, in_features: int) -> int:
        """G for rows of `in_features`; UserError where the group size does not divide them (blocks may be cut)."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size and self.scale_rows == 1:
            raise UserError(f"group_size {size} does not divide {in_features} input features")
        return -(-in_features // size)

    def columns(self, in_features: int) -> int:
        """Columns of one group."""
        return in_features if self.group_size == -1 else self.group_size

    @property
    def levels(self) -> int:
        """How many integer codes there are; codes are 0 .. levels - 1."""
        return 1 << self.bits

    @property
    def top(self) -> float:
        """The largest magnitude of a float element."""
        return FP8_MAX if self.bits == 8 else FP4_MAX

    def __str__(self) -> str:
        if self.element == "block":
            return self.block_type
        if self.scale_format != "float":
            return {"e4m3": "nvfp", "e8m0": "mxfp"}[self.scale_format] + str(self.bits)
        size = {-1: "tensor", BLOCK: f"{BLOCK}x{BLOCK} blocks", 1: None}[self.scale_rows]
        size = size or ("channel" if self.group_size == -1 else f"g{self.group_size}")
        if self.element == "float":
            return f"fp{self.bits} {size}"
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {size}"


_BLOCK_BITS = {"Q2_K": 2, "Q3_K": 3, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8}  # all others have 4


def block_spec(name: str) -> TensorSpec:
    """The format of a quantized GGUF type, by its name in ggml_types.QUANTIZED."""
    assert name in QUANTIZED, name
    return TensorSpec(_BLOCK_BITS.get(name, 4), GGML_TYPES[name].columns, element="block", block_type=name)


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """The number format a linear's input is rounded to while the model runs.

    group_size  -1: one scale for a token (dynamic) or for all inputs (static); else for so many features of a token
    dynamic     the scale is computed from the tokens being processed; False: from calibration, one for all inputs
    scale_format  as for weights; "e4m3" scales are dynamic, but their global scale comes from calibration
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    element: Literal["int", "float"] = "int"
    scale_format: Literal["float", "e4m3", "e8m0"] = "float"
    dynamic: bool = True

    @property
    def calibrated(self) -> bool:
        """Whether it needs a number from calibration."""
        return not self.dynamic or self.scale_format == "e4m3"

    @property
    def top(self) -> float:
        """The largest magnitude of a float element."""
        return FP8_MAX if self.bits == 8 else FP4_MAX

    def __str__(self) -> str:
        if self.scale_format != "float":
            return {"e4m3": "nvfp", "e8m0": "mxfp"}[self.scale_format] + str(self.bits)
        kind = f"{'int' if self.element == 'int' else 'fp'}{self.bits}{'' if self.symmetric else ' asym'}"
        group = "token" if self.group_size == -1 else f"g{self.group_size}"
        return f"{kind} {f'dynamic {group}' if self.dynamic else 'static'}"


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The number format of cached keys, or of cached values.

    per  "tensor" or "head": one scale for all tokens, from calibration; "token": one for each token and head, or for
         group_size features of it, taken from the token itself
    packed    the scale of a token (or group) is one 16-bit word: a float16, whose `bits` lowest bits are the zero point
              where there is one. False: a scale as it is computed, and a zero point beside it
    channels  each feature of a head has an offset and a scale from calibration, taken off before the token is rounded
              and put back when it is read
    """

    bits: int
    element: Literal["int", "float"]
    per: Literal["tensor", "head", "token"] = "tensor"
    symmetric: bool = True
    group_size: int = -1
    packed: bool = False
    channels: bool = False

    def __post_init__(self) -> None:
        if self.element == "float" and self.bits != 8:
            raise UserError(f"the floats of a cache have 8 bits, got {self.bits}")
        if not 2 <= self.bits <= 8:
            raise UserError(f"a cache has 2 to 8 bits, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size must be positive or -1 (all features of a head), got {self.group_size}")
        if self.packed and not self.symmetric and self.bits > 4:
            raise UserError(f"a packed scale has room for a zero point of 4 bits, not of {self.bits}")
        tokens = self.group_size != -1 or not self.symmetric or self.packed or self.channels
        if tokens and (self.element == "float" or self.per != "token"):
            raise UserError("groups, zero points, packed scales and channels are for integers with a scale per token")

    @property
    def calibrated(self) -> bool:
        """Whether it needs numbers from calibration."""
        return self.per != "token" or self.channels

    def bits_per_entry(self, features: int) -> float:
        """Bits that one number takes, its share of scale and zero point included, in a head of so many features.

        A scale counts 16 bits, a zero point outside it 8.
        """
        if self.per != "token":
            return float(self.bits)
        groups = 1 if self.group_size == -1 else -(-features // self.group_size)
        return self.bits + groups * (16 if self.packed or self.symmetric else 24) / features

    def __str__(self) -> str:
        size = self.per if self.group_size == -1 else f"{self.per} g{self.group_size}"
        words = [f"{'fp' if self.element == 'float' else 'int'}{self.bits} {size}"]
        words += ["asym"] * (not self.symmetric) + ["packed"] * self.packed + ["channels"] * self.channels
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Its fields; the later ones only where they say something, so that older files stay as they are."""
        later = ("packed", "channels")
        return {name: value for name, value in asdict(self).items() if name not in later or value}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear computes: the format of its weight and, unless None, of its input."""

    weights: TensorSpec
    activations: ActivationSpec | None = None

    def __str__(self) -> str:
        return str(self.weights) + (f", input {self.activations}" if self.activations else "")


_INT8_TOKEN, _FP8_TOKEN = ActivationSpec(8), ActivationSpec(8, element="float")
_FP8_CHANNEL, _FP8_TENSOR = (TensorSpec(8, -1, element="float", scale_rows=rows) for rows in (1, -1))
_NVFP4 = TensorSpec(4, 16, element="float", scale_format="e4m3")
_MXFP4, _MXFP8 = (TensorSpec(bits, 32, element="float", scale_format="e8m0") for bits in (4, 8))
PRESETS: dict[str, Scheme] = {
    "W4A16": Scheme(TensorSpec(4, 128)),
    "W4A16_ASYM": Scheme(TensorSpec(4, 128, symmetric=False)),
    "W8A16": Scheme(TensorSpec(8, -1)),
    "W8A8": Scheme(TensorSpec(8, -1), _INT8_TOKEN),
    "W4A8": Scheme(TensorSpec(4, 128), _INT8_TOKEN),
    "FP8": Scheme(_FP8_TENSOR, ActivationSpec(8, element="float", dynamic=False)),
    "FP8_DYNAMIC": Scheme(_FP8_CHANNEL, _FP8_TOKEN),
    "FP8_BLOCK": Scheme(
        TensorSpec(8, BLOCK, element="float", scale_rows=BLOCK), ActivationSpec(8, BLOCK, element="float")
    ),
    "NVFP4": Scheme(_NVFP4, ActivationSpec(4, 16, element="float", scale_format="e4m3")),
    "NVFP4A16": Scheme(_NVFP4),
    "MXFP4": Scheme(_MXFP4, ActivationSpec(4, 32, element="float", scale_format="e8m0")),
    "MXFP8": Scheme(_MXFP8, ActivationSpec(8, 32, element="float", scale_format="e8m0")),
}


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """What calibration found for a linear's input: x is about (code - zero) * scale.

    scale  float32 []; of "e4m3" activations the global scale their group scales are multiplied by
    zero   the zero point among the unsigned codes 0 .. 2**bits - 1, None when symmetric
    """

    scale: "Tensor"
    zero: int | None = None


class BlockScales(NamedTuple):
    """What GGUF's blocks hold beside d: w = d * sub_scale * level(code) - offset * sub_offset, in float32.

    offset_NG      float32 [N, G], a float16 number; zeros where the type has none. The m of Q4_1 and Q5_1 is -offset
    sub_scale_NS   float32 [N, S], integers, one for each sub-block of a row (S is G times 8 or 16); ones where the type
                   has no sub-blocks (S = G)
    sub_offset_NS  the same for the offset; ones where the type has no sub-blocks
    """

    offset_NG: "Tensor"
    sub_scale_NS: "Tensor"
    sub_offset_NS: "Tensor"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One linear's weight on its grid: w = element(code) * scale, computed in scale's dtype; `dequantize` does it.

    codes_NK  uint8 [N, K], unpacked: integers 0 .. 2**bits - 1, or the bit patterns of floats
    scale_NG  [N, G], one row for each row of the weight even where rows share a scale; in the dtype it is stored with
              (bf16, fp16 or fp32) if it is a plain float, else float32; may be negative where the format allows it
    zero_NG   uint8 [N, G], or None when symmetric: integers then have the zero point 2**(bits - 1)
    global_scale  of "e4m3" scales: scale_NG = e4m3 number * global_scale. Ours are powers of two, which are exact in
              formats that store the scale and in those that store its reciprocal
    input     the static range of the inputs, where the scheme has one
    blocks    what else the blocks of a GGUF type hold (scale_NG is then their d, float32); None for all other elements
    """

    codes_NK: "Tensor"
    scale_NG: "Tensor"
    zero_NG: "Tensor | None"
    spec: TensorSpec
    global_scale: float | None = None
    input: ActivationRange | None = None
    blocks: "BlockScales | None" = None

    def __post_init__(self) -> None:
        import torch

        N, K = self.codes_NK.shape
        G = self.spec.groups(K)
        assert self.codes_NK.dtype == torch.uint8
        assert self.scale_NG.shape == (N, G), f"scale {tuple(self.scale_NG.shape)}, expected {(N, G)}"
        assert (self.zero_NG is None) == self.spec.symmetric
        assert self.zero_NG is None or (self.zero_NG.shape == (N, G) and self.zero_NG.dtype == torch.uint8)
        assert (self.global_scale is not None) == (self.spec.scale_format == "e4m3")
        assert (self.blocks is not None) == (self.spec.element == "block")

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """The same weight cut to output rows [start, stop)."""
        zero_NG = None if self.zero_NG is None else self.zero_NG[start:stop]
        blocks = None if self.blocks is None else BlockScales(*(t[start:stop] for t in self.blocks))
        codes_NK, scale_NG = self.codes_NK[start:stop], self.scale_NG[start:stop]
        return replace(self, codes_NK=codes_NK, scale_NG=scale_NG, zero_NG=zero_NG, blocks=blocks)
