"""Random-sign Hadamard rotations (QuaRot, arXiv:2404.00456) of a weight's input columns or output rows.

R = diag(signs) H, H block-diagonal with copies of one Sylvester Hadamard matrix over the square root of its size. R is
orthogonal: what one matrix writes as x R, the next one reads with W R, and an outlier channel is spread over a block.

A Sylvester matrix of size a * b is the Kronecker product of those of sizes a and b, so a product with 4096 columns is
two small ones with 64 each: cheap beside whatever is done with the weight later.

Shapes: N = out features, K = in features, S = size of a rotation, P = size of its Hadamard blocks, a power of two.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import UserError

SMALLEST = 8  # a block of fewer channels spreads an outlier over too few to be worth the trouble


@dataclass(frozen=True, eq=False)
class Rotation:
    """R [S, S] = diag(signs_S) blockdiag(hadamard(block), ...). signs_S float64, block divides S."""

    signs_S: Tensor
    block: int

    @property
    def size(self) -> int:
        return len(self.signs_S)

    def repeated(self, count: int) -> "Rotation":
        """The same rotation of `count` parts one after the other: the heads of an attention layer."""
        return replace(self, signs_S=self.signs_S.repeat(count))

    def matrix(self) -> Tensor:
        """R itself, float64 [S, S]."""
        return apply_columns(torch.eye(self.size, dtype=torch.float64), self)


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size), float64 [size, size]: orthogonal and symmetric.

    ValueError unless size is a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"Sylvester's construction makes Hadamard matrices of powers of two, not of {size}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def rotation_of(size: int, seed: int = 0, *, smallest: int = SMALLEST) -> Rotation:
    """The random-sign Hadamard rotation of `size` channels, the same for the same seed.

    A size that is not a power of two gets blocks of its largest power-of-two divisor (3584 = 7 blocks of 512);
    UserError where that is below `smallest`.
    """
    block = size & -size
    if block < smallest:
        raise UserError(
            f"a Hadamard rotation of {size} channels: the largest power of two that divides {size} is {block}, "
            f"blocks of fewer than {smallest} channels are not worth a rotation"
        )
    generator = torch.Generator().manual_seed(seed)
    signs_S = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return Rotation(signs_S, block)


def apply_columns(w_NK: Tensor, rotation: Rotation) -> Tensor:
    """W R for w [..., K], K = rotation.size; computed and returned in float32, or float64 for a float64 w."""
    w_NK = _computed(w_NK, rotation.size)
    return _hadamard_columns(w_NK * rotation.signs_S.to(w_NK), rotation.block)


def undo_columns(w_NK: Tensor, rotation: Rotation) -> Tensor:
    """W R^T: the inverse of `apply_columns`."""
    w_NK = _computed(w_NK, rotation.size)
    return _hadamard_columns(w_NK, rotation.block) * rotation.signs_S.to(w_NK)


def apply_rows(w_NK: Tensor, rotation: Rotation) -> Tensor:
    """R^T W for w [N, K] or a bias [N], N = rotation.size: what was written as y is then written as y R."""
    if w_NK.dim() == 1:
        return apply_columns(w_NK, rotation)
    return apply_columns(w_NK.t(), rotation).t().contiguous()


def _computed(w_NK: Tensor, size: int) -> Tensor:
    if w_NK.shape[-1] != size:
        raise ValueError(f"a rotation of {size} channels on a weight with {w_NK.shape[-1]}")
    return w_NK.to(torch.promote_types(w_NK.dtype, torch.float32))


def _hadamard_columns(w_NK: Tensor, block: int) -> Tensor:
    """w times blockdiag(hadamard(block)), as products with its two Kronecker factors."""
    low = 1 << ((block.bit_length() - 1) // 2)
    h_low, h_high = hadamard(low).to(w_NK), hadamard(block // low).to(w_NK)
    w_Bhl = w_NK.reshape(-1, block // low, low)
    return (h_high @ (w_Bhl @ h_low)).reshape(w_NK.shape)
