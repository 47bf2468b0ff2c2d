"""The compiled part of the CPU path: the .cpp files beside this one, built once by torch's own C++ builder.

The library lies in $XDG_CACHE_HOME/quantkit (~/.cache/quantkit), under a name made of the sources, torch's version and
the processor's features; later processes only open it. Where no compiler works, or what it built computes something
else than torch does, there is no library and one warning says why: callers go on with torch's own operators.
QUANTKIT_COMPILE=0 asks for that.
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("gemv.cpp", "gemv_int8.cpp", "gemm_tiles.cpp", "attention.cpp")
HEADERS = ("vectors.h", "weight.h", "bf16.h", "tiles.h")
HERE = Path(__file__).parent
FLAGS = ("-fopenmp", "-ffp-contract=fast", "-Wno-psabi")  # beside the builder's own, which forbid a multiply-add
FORMATS = {"int4": 0, "int8": 1, "fp8": 2, "fp4": 3, "bf16": 4, "fp16": 5, "fp32": 6}  # of weight.h
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built where it is not there yet; None where it cannot be."""
    if os.environ.get("QUANTKIT_COMPILE") == "0":
        return None
    try:
        found = declare(ctypes.CDLL(str(build())))
        if error := self_test(found):
            raise RuntimeError(error)
    except Exception as error:  # whatever a foreign compiler does, torch's operators remain
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first = next((line for line in lines if "error:" in line), lines[0])
        warnings.warn(f"quantkit runs without its compiled CPU kernels, more slowly: {first}", stacklevel=2)
        return None
    return found


def build(flags: tuple[str, ...] = ()) -> Path:
    """The shared library's path, compiled unless the cache holds it. flags: further ones for the compiler."""
    files = [HERE / name for name in (*HEADERS, *SOURCES)]
    parts = [
        *(file.read_bytes() for file in files),
        torch.__version__.encode(),
        processor().encode(),
        repr((FLAGS, flags)).encode(),
    ]
    name = f"cpu_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}"
    folder = cache_folder()
    target = folder / f"{name}.so"
    if target.exists():
        return target
    from torch._inductor.cpp_builder import CppBuilder, CppOptions  # takes seconds, so only to build

    if sys.stderr.isatty():
        print("building the CPU kernels, once for this machine ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        options = CppOptions(warning_all=False, extra_flags=[*FLAGS, *flags])
        builder = CppBuilder(name, [str(HERE / source) for source in SOURCES], options, work)
        builder.build()
        os.replace(builder.get_target_file_path(), target)
    return target


def cache_folder() -> Path:
    """Where libraries are kept; a fresh folder of this process where the user's cache cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="quantkit-"))


@functools.cache
def processor() -> str:
    """What tells processors apart whose machine code differs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor()


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types, so that Python's integers arrive as 64-bit ones."""
    pointer, whole, number, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
    weight = [small, pointer, pointer, small, pointer, small, small, small, number, whole, whole, whole, small]
    lib.quantkit_gemv.argtypes = [*weight, pointer, pointer, whole]
    lib.quantkit_gemv_int8.argtypes = [*weight, pointer, pointer, pointer, whole]
    lib.quantkit_decode.argtypes = [*weight, whole, whole, pointer, small]
    lib.quantkit_gemm_tiles.argtypes = [*weight, pointer, whole, pointer, small, whole]
    lib.quantkit_decode_attention.argtypes = [small, small, *[pointer] * 10, *[whole] * 8, small]
    products = (lib.quantkit_gemv, lib.quantkit_gemv_int8, lib.quantkit_gemm_tiles)
    for function in (*products, lib.quantkit_decode, lib.quantkit_decode_attention):
        function.restype = None
    lib.quantkit_has_tiles.restype = small
    return lib


def self_test(lib: ctypes.CDLL) -> str | None:
    """Why the library is not to be trusted: a small product of each kind against float64, on this very processor."""
    N, K = 5, 128
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, generator=generator)
    scale, ones = torch.ones(N, 2), torch.ones(3)
    x = torch.randn(3, K, generator=generator)
    x_codes = torch.randint(-127, 128, (3, K), dtype=torch.int8, generator=generator)
    low, high = (codes[:, :64] & 15).double(), (codes[:, :64] >> 4).double()
    nibbles = torch.cat([low[:, :32], high[:, :32], low[:, 32:], high[:, 32:]], 1)
    packed = {"int4": codes[:, :64].contiguous(), "int8": codes}
    for format, values in (("int4", nibbles - 8), ("int8", codes.view(torch.int8).double())):
        middle = 8 if format == "int4" else 128
        head = (FORMATS[format], address(packed[format]), address(scale), 0, None, middle, 0, 0, 1.0, N, K, 64, 1)
        y, y_int8, decoded = torch.empty(3, N), torch.empty(3, N), torch.empty(N, K)
        lib.quantkit_gemv(*head, address(x), address(y), 3)
        lib.quantkit_gemv_int8(*head, address(x_codes), address(ones), address(y_int8), 3)
        lib.quantkit_decode(*head, 0, N, address(decoded), 0)
        wanted = x.double() @ values.T
        if not torch.allclose(y.double(), wanted, rtol=1e-4, atol=1e-2 * middle):
            return f"its {format} product is wrong on this processor"
        if not torch.equal(y_int8.double(), x_codes.double() @ values.T) or not torch.equal(decoded.double(), values):
            return f"its exact {format} product or decoding is wrong on this processor"
        if lib.quantkit_has_tiles():
            x_bf16 = x.bfloat16()
            lib.quantkit_gemm_tiles(*head, address(x_bf16), K, address(y), 1, 3)
            if not torch.allclose(y.double(), x_bf16.double() @ values.T, rtol=1e-4, atol=1e-2 * middle):
                return f"its {format} product on tiles is wrong on this processor"
    return None


def address(tensor: Tensor | None) -> int | None:
    """Of the first element; the caller keeps the tensor alive."""
    return None if tensor is None else tensor.data_ptr()
