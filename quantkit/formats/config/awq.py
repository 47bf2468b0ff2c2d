"""AutoAWQ's quantization_config, and which tensors belong to it; no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.types import KVSpec, Scheme, TensorSpec

MARK = "qweight"
SUFFIXES = ("qweight", "qzeros", "scales")
SIGNED_SCALES = True
KV_NAMES: tuple[str, str] | None = None
GROUP_SIZES = (-1, 16, 32, 64, 128)  # what gptqmodel, the reader behind transformers, has kernels for
SCALES = ("F16", "BF16")  # bfloat16 only in folders of others


def stored(shape: tuple[int, int], scheme: Scheme, scale_tag: str | None) -> common.Stored:
    """Suffix -> (dtype, shape) of the tensors of a weight (N, K) with such scales; UserError if it cannot be held."""
    (N, K), spec = shape, scheme.weights
    if scheme.activations is not None:
        raise UserError(f"awq has no quantized inputs ({scheme.activations}); compressed-tensors holds {scheme}")
    if (spec.bits, spec.element, spec.scale_format, spec.scale_rows) != (4, "int", "float", 1):
        raise UserError(f"awq holds 4-bit integers with a scale per group of a row, not {spec}")
    if spec.group_size not in GROUP_SIZES:
        raise UserError(f"awq readers know the group sizes {', '.join(map(str, GROUP_SIZES))}, not {spec.group_size}")
    if N % 8:
        raise UserError(f"awq packs 8 out features in a word, and {N} is not a multiple of 8")
    if scale_tag not in SCALES:
        raise UserError(f"awq scales are float16, not {common.dtype_name(scale_tag)}")
    G = spec.groups(K)
    return {
        "qweight": ("I32", (K, N // 8)),
        "qzeros": ("I32", (G, N // 8)),
        "scales": (scale_tag, (G, N)),
    }


def shape_of(tensors: common.Headers, scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module, from its headers; UserError where one of them does not fit the scheme."""
    common.require(tensors, set(SUFFIXES), scheme)
    K, words = common.matrix(tensors, "qweight")
    N = words * 8
    common.check_shapes(tensors, stored((N, K), scheme, tensors["scales"].tag), (N, K), scheme)
    return N, K


def config(schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
    """quantization_config for config.json; UserError for mixed schemes, a KV cache, or names readers would confuse."""
    ignored = sorted(set(ignored), key=common.natural)
    spec = common.sole_scheme(schemes, "awq").weights
    common.refuse_both(schemes, ignored)
    common.refuse_substrings(schemes, ignored, "awq")
    common.refuse_kv(kv, "awq")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": spec.group_size,
        "zero_point": not spec.symmetric,
        "version": "gemm",
        "modules_to_not_convert": ignored,
    }


def files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}


def read_config(quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Which of the modules are stored quantized, and how; UserError for another layout than 4-bit gemm."""
    qc = quantization_config
    if qc.get("quant_method") != "awq":
        raise UserError(f"quant_method {qc.get('quant_method')!r} is not awq")
    if str(qc.get("version", "gemm")).lower() != "gemm":
        raise UserError(f"awq version {qc['version']!r} cannot be read, only 'gemm'")
    bits, size = qc.get("bits", qc.get("w_bit", 4)), qc.get("group_size", qc.get("q_group_size", 128))
    zero_point = qc.get("zero_point", True)
    if bits != 4 or not isinstance(size, int) or not isinstance(zero_point, bool):
        raise UserError(f"awq with bits {bits!r}, group_size {size!r} and zero_point {zero_point!r} cannot be read")
    scheme = Scheme(TensorSpec(4, size, not zero_point))
    dense = common.names_of(qc, "modules_to_not_convert")
    return {name: scheme for name in modules if not any(entry in name for entry in dense)}


def read_kv(quantization_config: Mapping[str, Any]) -> KVSpec | None:
    """None: the format has no place for one."""
    return None
