"""What a quantized linear computes: one definition for each scheme.

Every path keeps it: a kernel for few tokens or many, on a CPU or a GPU, compiled or not, and the dequantized weight. So
a result depends neither on how many tokens are computed together nor on the processor. y = x W^T:

    weight-only, scales of 16 or 32 bits    W is rounded as the checkpoint's scales say: code * scale to the scales'
                                            dtype, then to x's. Engines decode it like this.
    weight-only, e4m3 or e8m0 scales        W = code * scale, not rounded (bfloat16 mostly holds it exactly anyway)
    inputs quantized                        x and W are both code * scale, not rounded: integer codes are summed
                                            exactly, and the sums of a group are multiplied by the scales

Sums are taken in float32, and y is rounded to x's dtype, once; a bias is added to that.

One exception: fused experts run from a dense parameter in the model's dtype, so what is not rounded by definition is
rounded to that (in float32 models: not at all).
"""

from dataclasses import replace

from torch import Tensor

from quantkit.grids.activations import fake_quantize
from quantkit.grids.dequantize import dequantize
from quantkit.types import QuantizedWeight, Scheme


def is_rounded(scheme: Scheme) -> bool:
    """Whether W is rounded before it meets x."""
    return scheme.activations is None and scheme.weights.scale_format == "float"


def multiplied_weight(q: QuantizedWeight, scheme: Scheme) -> Tensor:
    """W [N, K], in its scales' dtype where it is rounded (before it is rounded to x's, too), else in float32."""
    return dequantize(q if is_rounded(scheme) else replace(q, scale_NG=q.scale_NG.float()))


def reference(x: Tensor, q: QuantizedWeight, scheme: Scheme) -> Tensor:
    """y [..., N] in float64 for x [..., K] (bfloat16, float16 or float32), without y's own rounding."""
    w_NK = multiplied_weight(q, scheme)
    if scheme.activations is not None:
        x = fake_quantize(x.float(), scheme.activations, q.input)
    elif is_rounded(scheme):
        w_NK = w_NK.to(x.dtype)
    return x.double() @ w_NK.double().T
