"""GPTQ's layout: integers of 2, 3, 4 or 8 bits packed along the in features, in its two versions.

Per module: qweight int32 [K * bits / 32, N], qzeros int32 [G, N * bits / 32], scales float16 [G, N], g_idx int32 [K].
w[k, n] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]. Both packed tensors are the little-endian stream of `bitstream`,
qweight down its columns, qzeros along its rows. Version 1 ("gptq") stores z - 1, so that z = 0 has no place there;
version 2 ("gptq_v2") stores z. Symmetric weights have z = 2**(bits - 1), written out all the same.

g_idx is always written, though it says no more than k // group_size: gptqmodel computes nonsense without it. Files of
others whose g_idx says something else (activation order) cannot be read. gptqmodel's own loader refuses asymmetric
weights of version 1 unless gptqmodel wrote them: version 2 is the one to choose for these.

Scales may be negative, for the reasons given in `awq`. Sources: github.com/AutoGPTQ/AutoGPTQ,
github.com/ModelCloud/GPTQModel.

Shapes: N = out features, K = in features, G = groups of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.header import tag_of
from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.formats.bitstream import pack_words, unpack_words
from quantkit.formats.config.gptq import GptqConfig
from quantkit.types import QuantizedWeight, Scheme, TensorSpec


@dataclass(frozen=True, slots=True)
class Gptq(GptqConfig):
    """One version of the format, used like a format module."""

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """float16, whatever the weight was stored as."""
        return torch.float16

    def layout(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
        """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
        return common.as_layout(self.stored(shape, scheme, tag_of(scale_dtype)))

    def pack(self, q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
        """The module's tensors by suffix, as `layout` announces them.

        UserError for scales float16 cannot hold, and for zero points of 0 in version 1.
        """
        (N, K), spec = q.codes_NK.shape, q.spec
        self.layout((N, K), scheme or Scheme(spec), q.scale_NG.dtype)
        common.check_scales(q, self.name)
        middle_NG = torch.full_like(q.scale_NG, spec.levels // 2, dtype=torch.uint8)
        zero_NG = middle_NG if q.zero_NG is None else q.zero_NG
        if self.shift and (zero_NG == 0).any():
            raise UserError(f"{self.name} stores zero points less 1 and cannot hold the zero point 0; gptq_v2 can")
        return {
            "qweight": pack_words(q.codes_NK, spec.bits).T.contiguous(),
            "qzeros": pack_words((zero_NG - self.shift).T, spec.bits),
            "scales": q.scale_NG.T.contiguous(),
            "g_idx": _groups(K, spec),
        }

    def check_tensors(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module's tensors; UserError where one of them does not fit the scheme. g_idx may be absent."""
        return self.shape_of(common.headers_of(tensors), scheme)

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of `pack`; UserError where a tensor does not fit or says what a QuantizedWeight cannot hold."""
        N, K = self.check_tensors(tensors, scheme)
        spec = scheme.weights
        if "g_idx" in tensors and not torch.equal(tensors["g_idx"].cpu(), _groups(K, spec)):
            raise UserError("g_idx puts columns into groups by activation order; only groups of neighbours can be read")
        stored_NG = unpack_words(tensors["qzeros"], spec.bits, N).T.contiguous()
        if spec.symmetric:
            if not (stored_NG == spec.levels // 2 - self.shift).all():
                raise UserError(
                    f"sym is true in quantization_config, but qzeros holds others than {spec.levels // 2 - self.shift}"
                )
            zero_NG = None
        else:
            if self.shift and (stored_NG == spec.levels - 1).any():
                raise UserError(
                    f"qzeros holds {spec.levels - 1}, which version 1 readers take for a zero point of "
                    f"{spec.levels} or of 0: the file does not say which"
                )
            zero_NG = stored_NG + self.shift
        codes_NK = unpack_words(tensors["qweight"].T, spec.bits, K)
        return QuantizedWeight(codes_NK, tensors["scales"].T.contiguous(), zero_NG, spec)


V1, V2 = Gptq("gptq", 1), Gptq("gptq_v2", 0)


def _groups(K: int, spec: TensorSpec) -> Tensor:
    return torch.arange(K, dtype=torch.int32) // spec.columns(K)
