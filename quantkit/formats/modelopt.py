"""NVIDIA ModelOpt's layout of 8- and 4-bit floats (github.com/NVIDIA/Model-Optimizer), which TensorRT-LLM reads.

By quant_algo, the tensors of a module:
FP8                        weight float8_e4m3fn [N, K], weight_scale [], input_scale []
FP8_PER_CHANNEL_PER_TOKEN  weight float8_e4m3fn [N, K], weight_scale [N]
NVFP4                      weight uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], weight_scale_2 [],
                           input_scale []
W4A16_NVFP4                the same without input_scale

Scales are float32 but for NVFP4's of groups. All multiply: weight_scale_2, the global scale, is the reciprocal of what
compressed-tensors stores. The even one of two e2m1 elements takes the low half of a byte. Scales of an FP8 KV cache are
self_attn.k_proj.k_scale and self_attn.v_proj.v_scale, float32.

The configuration lies in config.json and once more, in an older form, in hf_quant_config.json.

Shapes: N = out features, K = in features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.checkpoint.header import tag_of
from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.formats.config.modelopt import (
    KV_NAMES,
    MARK,
    SIGNED_SCALES,
    SUFFIXES,
    config,
    files,
    has_input_scale,
    read_config,
    read_kv,
    shape_of,
    stored,
)
from quantkit.grids.dequantize import (
    collapse,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import ActivationRange, QuantizedWeight, Scheme

__all__ = ["KV_NAMES", "MARK", "SIGNED_SCALES", "SUFFIXES", "config", "files", "read_config", "read_kv"]


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """float32, whatever the weight was stored as."""
    return torch.float32


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    return common.as_layout(stored(shape, scheme, tag_of(scale_dtype)))


def pack(q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
    """The module's tensors by suffix, as `layout` announces them; the weight alone tells which."""
    if q.scale_NG.dtype != torch.float32:
        raise UserError(f"modelopt scales are float32, not {q.scale_NG.dtype}")
    if q.global_scale is not None:
        tensors = _pack_nvfp4(q, q.global_scale)
    else:
        common.check_scales(q, "modelopt")
        tensors = {
            "weight": q.codes_NK.view(FP8),
            "weight_scale": collapse(q.scale_NG, q.spec).reshape(() if q.spec.scale_rows == -1 else (-1,)),
        }
    if q.input is not None:
        tensors["input_scale"] = q.input.scale.reshape(()).float()
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module's tensors; UserError where one of them does not fit the scheme."""
    return shape_of(common.headers_of(tensors), scheme)


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`; UserError where a tensor does not fit the scheme."""
    (N, K), spec = check_tensors(tensors, scheme), scheme.weights
    given = ActivationRange(tensors["input_scale"].reshape(())) if has_input_scale(scheme) else None
    if spec.scale_format != "e4m3":
        scale_NG = expand(tensors["weight_scale"].reshape(-1, 1), spec, N)
        return QuantizedWeight(tensors["weight"].view(torch.uint8), scale_NG, None, spec, input=given)
    pairs_NP, whole = tensors["weight"], tensors["weight_scale_2"].reshape(())
    codes_NK = torch.stack((pairs_NP & 15, pairs_NP >> 4), dim=-1).reshape(N, K)
    scale_NG = tensors["weight_scale"].float() * whole
    return QuantizedWeight(codes_NK, scale_NG, None, spec, global_scale=float(whole), input=given)


def _pack_nvfp4(q: QuantizedWeight, global_scale: float) -> dict[str, Tensor]:
    if not q.scale_NG.isfinite().all() or not 0 < global_scale < float("inf"):
        raise UserError("a scale is not a finite number; modelopt cannot hold it")
    if (q.scale_NG < 0).any():
        raise UserError("a group scale is negative, and kernels for NVFP4 drop its sign")
    whole = torch.tensor(global_scale, dtype=torch.float32)
    return {
        "weight": q.codes_NK[:, 0::2] | q.codes_NK[:, 1::2] << 4,
        "weight_scale": (q.scale_NG / whole).to(FP8),
        "weight_scale_2": whole,
    }
