"""Which tensors each layout of compressed-tensors has, and the shape of a module from their headers; no torch."""

from quantkit.errors import UserError
from quantkit.formats.common import Headers, Stored, dtype_name, words_for
from quantkit.formats.compressed_tensors.config import config, files, layout_name, read_config, read_kv
from quantkit.types import Scheme, TensorSpec

__all__ = ["config", "files", "read_config", "read_kv"]

MARK = "weight_scale"
SUFFIXES = (
    *("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)
SIGNED_SCALES = True  # a negative scale is multiplied like any other by every reader that was tried
KV_NAMES = ("k_scale", "v_scale")
SCALES = ("BF16", "F16", "F32")


def stored(shape: tuple[int, int], scheme: Scheme, scale_tag: str | None) -> Stored:
    """Suffix -> (dtype, shape) of the tensors of a weight (N, K) with such scales; UserError if it cannot be held."""
    (N, K), spec, name = shape, scheme.weights, layout_name(scheme)
    G = spec.groups(K)
    if scale_tag not in SCALES:
        raise UserError(f"compressed-tensors scales are bfloat16, float16 or float32, not {dtype_name(scale_tag)}")
    rows = (1,) if spec.scale_rows == -1 else (-(-N // spec.scale_rows), G)
    tensors: Stored
    if name == "pack-quantized":
        tensors = {
            "weight_packed": ("I32", (N, words_for(K, spec.bits))),
            "weight_scale": (scale_tag, (N, G)),
            "weight_shape": ("I64", (2,)),
        }
        if not spec.symmetric:
            tensors["weight_zero_point"] = ("I32", (words_for(N, spec.bits), G))
    elif name == "int-quantized":
        tensors = {"weight": ("I8", (N, K)), "weight_scale": (scale_tag, rows)}
    elif name in ("float-quantized", "naive-quantized"):
        tensors = {"weight": ("F8_E4M3", (N, K)), "weight_scale": (scale_tag, rows)}
    else:
        if spec.bits == 4 and K % 2:
            raise UserError(f"two 4-bit floats share a byte: {K} input features are odd")
        weight: Stored = {"weight": ("F8_E4M3", (N, K))} if spec.bits == 8 else {"weight_packed": ("U8", (N, K // 2))}
        tensors = {**weight, "weight_scale": ("F8_E4M3" if spec.scale_format == "e4m3" else "U8", (N, G))}
        if spec.scale_format == "e4m3":
            tensors["weight_global_scale"] = ("F32", (1,))
    acts = scheme.activations
    if acts is not None and acts.calibrated:
        tensors["input_scale" if acts.scale_format == "float" else "input_global_scale"] = ("F32", (1,))
        if not acts.symmetric:
            tensors["input_zero_point"] = ("I8", (1,))
    return tensors


def shape_of(tensors: Headers, scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module, from its headers; UserError where one of them does not fit the scheme."""
    spec = scheme.weights
    if "weight_scale" not in tensors:
        raise UserError(
            f"{scheme} needs the tensors weight_scale and more; there are {', '.join(sorted(tensors)) or 'none'}"
        )
    N, K = _shape(tensors, spec)
    plain = spec.scale_format == "float"
    expected = stored((N, K), scheme, tensors["weight_scale"].tag if plain else "F32")
    if tensors.keys() | {"weight_shape"} != expected.keys() | {"weight_shape"}:
        found = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"{scheme} needs the tensors {', '.join(sorted(expected))}; there are {found}")
    for suffix, (tag, shape) in expected.items():
        if suffix == "weight_shape":
            continue
        found = tensors[suffix]
        one = shape == (1,) and found.single  # both are about
        if (found.shape != shape and not one) or found.tag != tag:
            raise UserError(
                f"{suffix} is {dtype_name(found.tag)} {list(found.shape)}, expected {dtype_name(tag)} {list(shape)} "
                f"for a weight of {N} x {K} in {scheme}"
            )
    return N, K


def _shape(tensors: Headers, spec: TensorSpec) -> tuple[int, int]:
    """(N, K) as one of the tensors tells it."""
    if "weight_shape" in tensors:
        values = tensors["weight_shape"].values
        if len(values) != 2 or any(value != int(value) or value < 1 for value in values):
            raise UserError(f"weight_shape holds {list(values)}, expected out and in features")
        return int(values[0]), int(values[1])
    if spec.element == "int" and "weight_packed" in tensors and spec.group_size != -1:
        N, G = tensors["weight_scale"].shape
        return N, G * spec.group_size
    for suffix, codes in (("weight", 1), ("weight_packed", 2)):
        if suffix in tensors and len(tensors[suffix].shape) == 2 and tensors[suffix].tag != "I32":
            N, columns = tensors[suffix].shape
            return N, columns * codes
    raise UserError(f"{spec} needs the tensors weight_shape or weight; there are {', '.join(sorted(tensors))}")
