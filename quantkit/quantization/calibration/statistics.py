"""What calibration gathers of the inputs of linears: sums over tokens, so several processes can add theirs up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.algorithms.gptq import accumulate, finish


@dataclass(slots=True)
class Statistic:
    """Sums over the tokens that reached one input group; those nobody asked for are None.

    square_sum_K  of x^2; it is the hessian's diagonal where there is one, and then complete after `finish`
    hessian_KK  X^T X, where an algorithm asks for it; blocks_Bbb its blocks of b columns on the diagonal, where only
                those are asked for
    """

    count: int
    square_sum_K: Tensor
    abs_sum_K: Tensor | None = None
    hessian_KK: Tensor | None = None
    blocks_Bbb: Tensor | None = None

    @staticmethod
    def empty(x_MK: Tensor, *, hessian: bool, block: int | None = None, magnitude: bool = False) -> "Statistic":
        """No token yet, for inputs like x_MK."""
        K = x_MK.shape[1]
        zeros = torch.zeros(K, dtype=torch.float64, device=x_MK.device)
        found = Statistic(0, zeros, zeros.clone() if magnitude else None)
        if hessian:
            found.hessian_KK = torch.zeros(K, K, dtype=torch.float32, device=x_MK.device)
        elif block is not None:
            found.blocks_Bbb = torch.zeros(K // block, block, block, dtype=torch.float32, device=x_MK.device)
        return found

    @staticmethod
    def sizes(K: int, *, hessian: bool, block: int | None = None) -> list[int]:
        """Bytes of the tensors that `empty` makes."""
        return [8 * K, 4 * K * K if hessian else 4 * K * (block or 0)]

    def add(self, x_MK: Tensor) -> None:
        """Add one batch of inputs [M, K]."""
        x_MK = x_MK.float()
        self.count += len(x_MK)
        if self.abs_sum_K is not None:
            self.abs_sum_K += torch.linalg.vector_norm(x_MK, 1, dim=0)
        if self.hessian_KK is not None:
            accumulate(self.hessian_KK, x_MK)
        else:
            self.square_sum_K += torch.linalg.vector_norm(x_MK, dim=0).double().square()
        if self.blocks_Bbb is not None:
            x_BMb = x_MK.reshape(len(x_MK), *self.blocks_Bbb.shape[:2]).transpose(0, 1)
            self.blocks_Bbb.baddbmm_(x_BMb.mT, x_BMb)

    def finish(self) -> None:
        """Complete the hessian, of which `add` fills only one half."""
        if self.hessian_KK is not None:
            finish(self.hessian_KK)
            self.square_sum_K.copy_(self.hessian_KK.diagonal())

    def mean_square(self) -> Tensor:
        """E[x^2] of each feature, float32 [K]."""
        return (self.square_sum_K / self.count).float()

    def diagonal_blocks(self, size: int) -> Tensor | None:
        """The hessian's blocks of `size` columns [G, size, size]; None where they were not gathered."""
        whole = self.hessian_KK[None] if self.hessian_KK is not None else self.blocks_Bbb
        if whole is None or whole.shape[1] % size:
            return None
        B, b, _ = whole.shape
        parts = whole.reshape(B, b // size, size, b // size, size)
        index = torch.arange(b // size, device=whole.device)
        return parts[:, index, :, index, :].transpose(0, 1).reshape(-1, size, size)


def merged(statistics: list[Statistic]) -> Statistic:
    """The sum of statistics of inputs with the same features; the first one is added to in place."""
    total = statistics[0]
    for other in statistics[1:]:
        total.count += other.count
        total.square_sum_K += other.square_sum_K
        if total.abs_sum_K is not None and other.abs_sum_K is not None:
            total.abs_sum_K += other.abs_sum_K
        if total.hessian_KK is not None and other.hessian_KK is not None:
            total.hessian_KK += other.hessian_KK
        if total.blocks_Bbb is not None and other.blocks_Bbb is not None:
            total.blocks_Bbb += other.blocks_Bbb
    total.finish()
    return total


class OutputDrift:
    """sum over tokens of W (x0 - x) x^T [N, K]: how far the quantized prefix moved this group's outputs.

    With X0 the original model's inputs and X those behind quantized layers, W' = W + drift (X X^T + damping)^-1
    minimises ||W X0 - W' X||^2. Kept as a difference because W' - W is small: float32 is then enough.
    Computed as (W (X0 - X)) X^T or as W ((X0 - X) X^T), whichever takes fewer operations.
    """

    def __init__(self, weights: dict[str, Tensor], original_MK: Tensor) -> None:
        self.names = list(weights)
        self.rows = [len(w) for w in weights.values()]
        self.weight_NK = torch.cat([w.float() for w in weights.values()])
        self.original_MK = original_MK
        N, K = self.weight_NK.shape
        self.by_output = _by_output(N, K)
        self.sum = self.weight_NK.new_zeros(N if self.by_output else K, K)

    @staticmethod
    def sizes(N: int, K: int, tokens: int) -> list[int]:
        """Bytes of the tensors alive while a batch of so many tokens is added: weights, sum, what has moved."""
        return [4 * N * K, 4 * (N if _by_output(N, K) else K) * K, 4 * tokens * K]

    def add(self, x_MK: Tensor, tokens: slice) -> None:
        """Add one batch; tokens says where in the original inputs its rows are."""
        x_MK = x_MK.float()
        rows = rows_of(tokens, len(x_MK))
        assert rows is not None, "originals are kept only of inputs with as many rows for each token"
        moved_MK = self.original_MK[rows].to(x_MK) - x_MK
        if self.by_output:
            moved_MK = moved_MK @ self.weight_NK.T
        self.sum.addmm_(moved_MK.T, x_MK)

    def finish(self) -> dict[str, Tensor]:
        """The drift of each linear by name."""
        drift_NK = self.sum if self.by_output else self.weight_NK @ self.sum
        return dict(zip(self.names, drift_NK.split(self.rows), strict=True))


def rows_of(tokens: slice, count: int) -> slice | None:
    """Where the rows of these tokens lie, if each has as many (models run several streams); None where that differs."""
    each, rest = divmod(count, tokens.stop - tokens.start)
    return None if rest else slice(tokens.start * each, tokens.stop * each)


def _by_output(N: int, K: int) -> bool:
    """Whether outputs are few enough to be what is summed."""
    return N * 2 < K
