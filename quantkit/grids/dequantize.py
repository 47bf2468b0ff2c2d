"""Weights from codes and scales."""

from torch import Tensor

from quantkit.grids.block_types import BLOCK_TYPES, BlockParameters, decode_blocks
from quantkit.grids.elements import float_steps
from quantkit.types import QuantizedWeight, TensorSpec


def expand(scale: Tensor, spec: TensorSpec, N: int) -> Tensor:
    """Scales [N, G], one row for each row of the weight, of stored ones: a row for `spec.scale_rows` rows."""
    if spec.scale_rows == 1:
        return scale
    return (
        scale.expand(N, -1) if spec.scale_rows == -1 else scale.repeat_interleave(spec.scale_rows, 0)[:N]
    ).contiguous()


def collapse(scale_NG: Tensor, spec: TensorSpec) -> Tensor:
    """The inverse of `expand`."""
    if spec.scale_rows == 1:
        return scale_NG
    return scale_NG[:1].contiguous() if spec.scale_rows == -1 else scale_NG[:: spec.scale_rows].contiguous()


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight [N, K] a quantized weight stands for, in its scale's dtype."""
    if q.blocks is not None:
        parameters = BlockParameters(q.scale_NG, *q.blocks)
        return decode_blocks(q.codes_NK, parameters, BLOCK_TYPES[q.spec.block_type])
    (N, K), G, dtype = q.codes_NK.shape, q.scale_NG.shape[1], q.scale_NG.dtype
    size = q.spec.columns(K)
    if q.spec.element == "float":
        steps_NK = float_steps(q.codes_NK, q.spec.bits, dtype)
        if G * size == K:
            return (steps_NK.reshape(N, G, size) * q.scale_NG[..., None]).reshape(N, K)
        return steps_NK * q.scale_NG.repeat_interleave(size, 1)[:, :K]  # blocks cut short at the right edge
    zero = q.spec.levels // 2 if q.zero_NG is None else q.zero_NG[..., None].to(dtype)
    codes_NGg = q.codes_NK.reshape(N, G, size).to(dtype)
    return ((codes_NGg - zero) * q.scale_NG[..., None]).reshape(N, K)
