"""The words every other module speaks: what a weight is written as, and the one currency between the axes.

N = out features, K = in features, G = groups of a row = ceil(K / group_size).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import UserError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The number format of one tensor: integers of `bits`, one scale per `group_size` columns of a row.

    group_size -1 means one group per row ("channel"). symmetric means no zero point is stored.
    """

    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits must be 2 to 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size must be positive or -1 (channel), got {self.group_size}")

    def groups(self, in_features: int) -> int:
        """G for rows of `in_features`; UserError where the group size does not divide them."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise UserError(f"group_size {size} does not divide {in_features} input features")
        return in_features // size

    @property
    def levels(self) -> int:
        """How many codes there are; codes are 0 .. levels - 1."""
        return 1 << self.bits

    def __str__(self) -> str:
        size = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {size}"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One linear's weight on its grid: w = (codes - zero) * scale, computed in scale's dtype.

    codes_NK  uint8 [N, K], 0 .. 2**bits - 1, never packed
    scale_NG  [N, G] in the dtype it is stored with (bf16, fp16 or fp32); may be negative where the format allows it
    zero_NG   uint8 [N, G], or None when symmetric: the zero point is then 2**(bits - 1)
    """

    codes_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    spec: TensorSpec

    def __post_init__(self) -> None:
        N, K = self.codes_NK.shape
        G = self.spec.groups(K)
        assert self.codes_NK.dtype == torch.uint8
        assert self.scale_NG.shape == (N, G), f"scale {tuple(self.scale_NG.shape)}, expected {(N, G)}"
        assert (self.zero_NG is None) == self.spec.symmetric
        assert self.zero_NG is None or (self.zero_NG.shape == (N, G) and self.zero_NG.dtype == torch.uint8)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """The same weight cut to output rows [start, stop)."""
        zero_NG = None if self.zero_NG is None else self.zero_NG[start:stop]
        return replace(self, codes_NK=self.codes_NK[start:stop], scale_NG=self.scale_NG[start:stop], zero_NG=zero_NG)
