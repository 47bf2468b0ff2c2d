"""GPTQ (arXiv:2210.17323) as linear feedback, with the exact asymmetric re-fit.

Written with a Cholesky factor, the error GPTQ keeps small falls apart into one square per column:

    tr(E H E^T) = |E L|_F^2,   E = W - Q,   H + ridge I = L L^T,   column k of E L = sum over j >= k of E_j L_jk

so walk k from the last column to the first and round w_k + sum over j > k of E_j L_jk / L_kk: every square is then as
small as rounding allows. That is GPTQ exactly (QuIP, arXiv:2307.13304, theorem 6), with no inverse and no second
factorisation, and a column only ever reads errors that are final, which makes it matrix products over finished columns.
act_order sorts the columns by rising E[x^2], so the walk starts at the most important one.

Re-fit ("asymmetric calibration": GPTAQ, arXiv:2504.02692; Qronos, arXiv:2505.11695). With X what the quantized layers
before produce and Y0 the outputs wanted (those of the original model), |Y0 - X Q^T|^2 = |X W'^T - X Q^T|^2 + constant
for W' = (Y0^T X)(X^T X)^-1: quantize W' instead of W. Both sides are damped alike: W' = (M + ridge W)(H + ridge I)^-1
with M = Y0^T X, or W' = W + D (H + ridge I)^-1 with D = (Y0 - X W^T)^T X, which keeps its precision in float32.

Few tokens. All of this is regression: the walk predicts the errors made so far from the features left, the re-fit the
lost outputs from all features. With T tokens for K features such a regression fits noise unless K/T is small. Its best
ridge, where every feature is as likely to matter as any other, is H_kk * K/T * unexplained / explained variance. So
where the number of tokens is known, the diagonal of H is first multiplied by 1 + SHRINKAGE * K/T: all correlations
shrink, whatever the scales of the features. Ranges, walk, sweeps and re-fit all work on the result.

Shapes: N = out features (all linears that share the input, stacked), K = in features, G = groups of a row,
B = columns of a block. Tensors named _KN are transposed, so that one column of the weight is one run of memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.algorithms.coordinate_descent import sweep
from quantkit.algorithms.interface import Evidence, Needs, Quantized
from quantkit.errors import RunError, UserError
from quantkit.grids import ColumnGrid, Grid, joined, rows_of
from quantkit.types import QuantizedWeight, TensorSpec

LEAF = 16  # columns rounded one by one between two small matrix products
TURN = 128  # rows transposed at a time
MOST_DAMPING = 10.0
SHRINKAGE = 4.0  # unexplained over explained variance of these regressions: measured, and flat from 2 to 4
FEW_TOKENS = 8  # per input feature of the widest linear: there KL was measured 20 to 35 % above that of 40 and more
PROBE_ROWS = 128  # rows whose rounding error is measured for comparison: all rows would cost as much as GPTQ itself


@dataclass(frozen=True, slots=True)
class Factor:
    """A = H + diag(added_K) = L L^T after its columns were put in `order_K`; shared by all weights with this input.

    upper_KK  L^T with its rows divided by the diagonal (unit upper triangular); diagonal_K that diagonal
    order_K   order_K[i] is the original column at place i; places are walked from the last to the first
    importance_K  diag(A), in the original order; added_K the part of it that is damping (by tokens, and the ridge)
    damping   ridge / mean(diag H) in the end; attempts counts factorisations (1 = the damping asked for was enough)
    dead_K    columns that were never active; they are simply rounded
    matrix_KK  A itself, in that order, where it was kept (for sweeps)
    """

    upper_KK: Tensor
    diagonal_K: Tensor
    order_K: Tensor
    importance_K: Tensor
    added_K: Tensor
    damping: float
    attempts: int
    dead_K: Tensor
    matrix_KK: Tensor | None


@dataclass(frozen=True, slots=True)
class GptqInfo:
    """What happened. Errors are tr(E A E^T) of single rows, E = target - quantized.

    error_N  of every row; rounded_P and energy_P (the target's own, E = target) of the sampled rows probe_P, for
    rounding to nearest on the same ranges
    """

    damping: float
    attempts: int
    dead_columns: int
    error_N: Tensor
    probe_P: Tensor
    rounded_P: Tensor
    energy_P: Tensor

    def relative_errors(self, start: int = 0, stop: int | None = None) -> tuple[float, float]:
        """Rounding's and GPTQ's error over output energy, for rows [start, stop) (one linear of those stacked)."""
        stop = len(self.error_N) if stop is None else stop
        inside_P = (self.probe_P >= start) & (self.probe_P < stop)
        if not inside_P.any():  # fewer rows than the spacing of the sample
            inside_P = torch.ones_like(inside_P)
        energy = self.energy_P[inside_P].sum().clamp(min=torch.finfo(torch.float32).tiny)
        rows = self.probe_P[inside_P]
        return (self.rounded_P[inside_P].sum() / energy).item(), (self.error_N[rows].sum() / energy).item()


def factor(
    hessian_KK: Tensor,
    *,
    tokens: int | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    float64: bool = False,
    overwrite: bool = False,
    keep_matrix: bool = False,
) -> Factor:
    """Factorise hessian_KK = X^T X (sum over tokens, symmetric, float32 or float64) once for all its weights.

    tokens  behind the sum: the diagonal is multiplied by 1 + SHRINKAGE * K / tokens (None: by 1)
    ridge = damping * mean(diag H), raised tenfold as long as the matrix will not factor; the result says so.
    overwrite lets the Hessian's own memory be used: [K, K] twice instead of three times. keep_matrix is for `sweeps`.
    RunError where H holds NaN or Inf, or will not factor at all.
    """
    K = len(hessian_KK)
    if hessian_KK.shape != (K, K):
        raise UserError(f"the Hessian must be square, got {tuple(hessian_KK.shape)}")
    if not torch.isfinite(hessian_KK.sum()):
        raise RunError("the Hessian holds NaN or Inf: the inputs of this layer overflowed during calibration")
    dtype = torch.float64 if float64 else torch.promote_types(hessian_KK.dtype, torch.float32)
    diag_K = hessian_KK.diagonal().to(dtype, copy=True)
    dead_K = diag_K <= 0
    order_K = torch.argsort(diag_K, stable=True) if act_order else torch.arange(K, device=diag_K.device).flip(0)
    mean = diag_K.double().mean().item() or 1.0  # no input at all: any ridge turns GPTQ into plain rounding
    added_K = diag_K * (SHRINKAGE * K / tokens if tokens else 0.0)

    matrix_KK = hessian_KK.to(dtype)
    spare_KK = torch.index_select(matrix_KK, 0, order_K)
    if overwrite or matrix_KK is not hessian_KK:
        torch.index_select(spare_KK, 1, order_K, out=matrix_KK)
    else:
        matrix_KK = torch.index_select(spare_KK, 1, order_K)
    failed = torch.empty((), dtype=torch.int32, device=diag_K.device)
    attempts, ridge = 0, 0.0
    while True:
        attempts += 1
        ridge = damping * mean
        matrix_KK.diagonal().copy_((diag_K + added_K)[order_K]).add_(ridge)
        # LAPACK fills columns: handing it the transpose makes L^T appear as rows in spare_KK, with no further copy
        torch.linalg.cholesky_ex(matrix_KK, out=(spare_KK.mT, failed))
        diagonal_K = spare_KK.diagonal().clone()
        if not failed and torch.isfinite(diagonal_K).all():
            break
        if damping >= MOST_DAMPING:
            raise RunError(
                f"the Hessian [{K}, {K}] does not factor even with damping {damping:g}: "
                "calibrate on more tokens, or set float64: true in the gptq options"
            )
        damping = min(max(damping * 10, 1e-4), MOST_DAMPING)
    spare_KK.div_(diagonal_K[:, None])
    kept_KK = matrix_KK if keep_matrix else None
    added_K += ridge
    return Factor(spare_KK, diagonal_K, order_K, diag_K + added_K, added_K, ridge / mean, attempts, dead_K, kept_KK)


def share_left(factor: Factor) -> float:
    """GPTQ's squared error over rounding's, where rounding errors of all columns are alike: from the factor alone.

    Rounding loses A_kk for column k, GPTQ L_kk^2. Measured errors are near it, whatever the weights and the grid.
    """
    lost = factor.diagonal_K.double().square().sum() / factor.importance_K.double().sum()
    return min(1.0, lost.item())


def refit(
    weight_NK: Tensor, factor: Factor, *, cross_NK: Tensor | None = None, drift_NK: Tensor | None = None
) -> Tensor:
    """W' of the module docstring: the weight whose outputs on X come nearest to the wanted ones.

    One of cross_NK = Y0^T X and drift_NK = (Y0 - X W^T)^T X, summed over the same tokens as H.
    """
    assert (cross_NK is None) != (drift_NK is None)
    if drift_NK is not None:
        return _solve(_transposed(drift_NK, factor), factor).add_(weight_NK)
    assert cross_NK is not None
    return _solve(_transposed(weight_NK * factor.added_K, factor).add_(_transposed(cross_NK, factor)), factor)


def _solve(target_KN: Tensor, factor: Factor) -> Tensor:
    """[N, K] in the original order: target A^-1. target_KN is consumed."""
    # X U = B on the row-major [K, N]: its transpose is what LAPACK calls a matrix, so nothing is copied
    rows_NK = target_KN.mT
    upper_KK = factor.upper_KK
    torch.linalg.solve_triangular(upper_KK, rows_NK, upper=True, left=False, unitriangular=True, out=rows_NK)
    target_KN.div_(factor.diagonal_K.square()[:, None])
    torch.linalg.solve_triangular(upper_KK.mT, rows_NK, upper=False, left=False, unitriangular=True, out=rows_NK)
    return _restored(target_KN, factor)


def gptq(
    weight_NK: Tensor,
    hessian: Tensor | Factor,
    grid: Grid,
    *,
    drift_NK: Tensor | None = None,
    cross_NK: Tensor | None = None,
    sweeps: int = 0,
    damping: float = 0.01,
    act_order: bool = True,
    ranges: Literal["fixed", "updated"] = "fixed",
    block_size: int = 128,
    float64: bool = False,
    stacked: Sequence[int] | None = None,
) -> tuple[QuantizedWeight, GptqInfo]:
    """Quantize weight_NK so that its outputs on the inputs behind `hessian` change least.

    hessian  X^T X [K, K], or its `factor` where several weights share it (damping, act_order, float64 are then in it)
    drift_NK, cross_NK  what the outputs should have been, as for `refit`; neither keeps the weight itself as the target
    sweeps   rounds of coordinate descent on scales and codes after the walk: each a few per cent less error for twice
             the walk's work; a factor given must have kept its matrix
    ranges   "fixed": every group's range comes from the target weight; "updated": from the target plus the errors fed
             back to it when its first column is reached (needs act_order off: groups must be walked whole)
    stacked  rows of each linear, where weight_NK is several: blocks of rows do not reach from one into the next, and
             what belongs to a whole tensor (its scale, or the global one) is common to all
    block_size changes speed only
    """
    if not torch.isfinite(weight_NK.sum(dtype=torch.float32)):
        raise RunError("the weight holds NaN or Inf")
    if isinstance(hessian, Tensor):
        hessian = factor(hessian, damping=damping, act_order=act_order, float64=float64, keep_matrix=sweeps > 0)
    K = weight_NK.shape[1]
    if len(hessian.order_K) != K:
        raise UserError(f"the Hessian is [{len(hessian.order_K)}, ...], the weight has {K} input features")
    target_NK = weight_NK
    if drift_NK is not None or cross_NK is not None:
        target_NK = refit(weight_NK, hessian, cross_NK=cross_NK, drift_NK=drift_NK)
    if ranges == "updated" and hessian.order_K[0] != K - 1:
        raise UserError("gptq: ranges: updated needs act_order: false")
    if ranges == "updated" and not grid.row_wise:
        raise UserError("gptq: ranges: updated needs a scale for each row, but rows of this grid share scales")
    grid = grid.for_tensors([target_NK], hessian.importance_K)
    parts = target_NK.split(list(stacked)) if stacked else (target_NK,)
    fitted = joined([grid.fit(part_NK, hessian.importance_K) for part_NK in parts])
    error_KN = _transposed(target_NK, hessian)
    columns = grid.by_column(fitted, K, error_KN.dtype)
    codes_KN, error_N = _walk(error_KN, hessian, grid, columns, ranges == "updated", block_size)
    probe = _probe(target_NK, hessian, grid, columns)
    if sweeps:
        assert hessian.matrix_KK is not None, "sweeps need factor(..., keep_matrix=True)"
        for _ in range(sweeps):
            error_N += sweep(error_KN, codes_KN, columns, hessian.matrix_KK, hessian.order_K)
    q = grid.weight(_restored(codes_KN, hessian), columns.parameters())
    dead = int(hessian.dead_K.sum())
    return q, GptqInfo(hessian.damping, hessian.attempts, dead, error_N, *probe)


def _transposed(weight_NK: Tensor, factor: Factor) -> Tensor:
    """[K, N] in the factor's order and dtype, in memory of its own."""
    N, K = weight_NK.shape
    result_KN = torch.empty(K, N, dtype=factor.upper_KK.dtype, device=weight_NK.device)
    for start in range(0, N, TURN):  # gathering from a transposed view touches a cache line per element
        rows_nK = weight_NK[start : start + TURN].to(result_KN.dtype)
        result_KN[:, start : start + TURN] = rows_nK.mT.contiguous()[factor.order_K]
    return result_KN


def _restored(weight_KN: Tensor, factor: Factor) -> Tensor:
    """The inverse of `_transposed`: [N, K] in the original order."""
    K, N = weight_KN.shape
    place_K = torch.argsort(factor.order_K)
    result_NK = torch.empty(N, K, dtype=weight_KN.dtype, device=weight_KN.device)
    for start in range(0, N, TURN):
        result_NK[start : start + TURN] = weight_KN[:, start : start + TURN][place_K].mT
    return result_NK


def _walk(
    error_KN: Tensor, factor: Factor, grid: Grid, columns: ColumnGrid, updated: bool, block: int
) -> tuple[Tensor, Tensor]:
    """Codes (uint8) in the factor's order and the error of every row. error_KN: the target in, target - Q out.

    With `updated`, the parameters of every span of columns are fitted again when the walk reaches it.
    """
    K, N = error_KN.shape
    upper_KK, order = factor.upper_KK, factor.order_K.tolist()
    codes_KN = torch.empty(K, N, dtype=torch.uint8, device=error_KN.device)
    error_N = error_KN.new_zeros(N)
    block_size = columns.span if updated else min(block, K)
    step_BN = error_KN.new_empty(block_size, N)
    rounded_N = torch.empty(N, dtype=columns.value_dtype, device=error_KN.device)

    for stop in range(K, 0, -block_size):
        start = max(0, stop - block_size)
        wanted_BN = torch.addmm(error_KN[start:stop], upper_KK[start:stop, stop:], error_KN[stop:])
        if updated:
            seen_BN = _seen_by_group(error_KN[start:stop], wanted_BN, upper_KK[start:stop, start:stop])
            first = order[stop - 1]
            assert first % block_size == 0, "spans are walked whole, each from its last column to its first"
            span_B = factor.order_K[start:stop].flip(0)
            columns.put(first, grid.fit(seen_BN.flip(0).mT, factor.importance_K[span_B]))
        for leaf_stop in range(stop, start, -LEAF):
            leaf = max(start, leaf_stop - LEAF)
            wanted_BN[leaf - start : leaf_stop - start].addmm_(
                upper_KK[leaf:leaf_stop, leaf_stop:stop], error_KN[leaf_stop:stop]
            )
            for k in range(leaf_stop - 1, leaf - 1, -1):
                wanted_N = wanted_BN[k - start]
                if k + 1 < leaf_stop:
                    wanted_N.addmv_(error_KN[k + 1 : leaf_stop].mT, upper_KK[k, k + 1 : leaf_stop])
                columns.nearest_(wanted_N, order[k], step_BN[k - start], rounded_N)
                wanted_N.sub_(rounded_N)
                error_KN[k].sub_(rounded_N)
        codes_KN[start:stop] = columns.codes(step_BN[: stop - start], factor.order_K[start:stop])
        error_N += wanted_BN.mul_(factor.diagonal_K[start:stop, None]).square_().sum(0)

    return codes_KN, error_N


def _seen_by_group(target_BN: Tensor, wanted_BN: Tensor, upper_BB: Tensor) -> Tensor:
    """The group's weights after all finished columns spread their errors over ALL columns left, as textbook GPTQ does.

    `wanted` assumes that the columns in between pass errors on; undoing that is a solve with the group's own factor.
    """
    return target_BN + torch.linalg.solve_triangular(upper_BB, wanted_BN - target_BN, upper=True, unitriangular=True)


def _probe(target_NK: Tensor, factor: Factor, grid: Grid, columns: ColumnGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Rows probe_P, their error when rounded to nearest, and their energy."""
    N = len(target_NK)
    probe_P = torch.arange(0, N, -(-N // PROBE_ROWS), device=target_NK.device)
    target_PK = target_NK[probe_P].to(factor.upper_KK.dtype)
    fitted = rows_of(columns.parameters(), probe_P)
    rounded_PK = grid.decode(grid.encode(target_PK, fitted), fitted).to(target_PK.dtype)
    both_KP = _transposed(torch.cat([target_PK - rounded_PK, target_PK]), factor)
    # |E L|^2 row by row, L^T = diagonal * unit upper
    errors_P = (factor.upper_KK @ both_KP).mul_(factor.diagonal_K[:, None]).square_().sum(0)
    rounded_P, energy_P = errors_P.split(len(probe_P))
    return probe_P, rounded_P, energy_P


def needs(options: Mapping[str, Any], spec: TensorSpec) -> Needs:
    """The Hessian; for the re-fit the original inputs too."""
    return Needs(hessian=True, original_inputs=options["refit"])


def refusal(options: Mapping[str, Any], spec: TensorSpec) -> str | None:
    """Why a number format cannot have ranges that are updated during the walk; None where it can."""
    if options["ranges"] == "updated" and spec.element == "block":
        return f"gptq: ranges: updated is impossible for {spec}: the scales of a GGUF block belong together"
    if options["ranges"] == "updated" and (options["act_order"] or spec.scale_rows != 1):
        needs = "act_order: false" if options["act_order"] else f"a scale for each row, which {spec} has not"
        return f"gptq: ranges: updated needs {needs}"
    return None


def working_sizes(N: int, K: int, options: Mapping[str, Any], *, drift: bool) -> list[int]:
    """Bytes of the tensors `quantize` holds at its worst beside the Hessian: N rows of all linears of one input.

    The factor; the linears stacked, their error and codes; with a drift that of each, of all, and the re-fitted target.
    """
    wide = 8 if options["float64"] else 4
    factor = [wide * K * K] * (3 if options["float64"] else 1)
    return [*factor, 4 * N * K, wide * N * K, 2 * N * K, *([4 * N * K, 4 * N * K, wide * N * K] if drift else [])]


def quantize(weights: Sequence[Tensor], evidence: Evidence, grid: Grid, options: Mapping[str, Any]) -> list[Quantized]:
    """All weights stacked: one factorisation and one walk serve them."""
    assert evidence.hessian_KK is not None
    shared = factor(
        evidence.hessian_KK,
        tokens=evidence.tokens,
        damping=options["damping"],
        act_order=options["act_order"],
        float64=options["float64"],
        overwrite=evidence.consume,
        keep_matrix=options["sweeps"] > 0,
    )
    sizes = [len(weight_NK) for weight_NK in weights]
    q, info = gptq(
        torch.cat([weight_NK.float() for weight_NK in weights]),
        shared,
        grid,
        stacked=sizes,
        drift_NK=None if evidence.drift is None else torch.cat(list(evidence.drift)),
        sweeps=options["sweeps"],
        ranges=options["ranges"],
        block_size=options["block_size"],
    )
    results, start = [], 0
    for size in sizes:
        rounded, error = info.relative_errors(start, start + size)
        part = q.rows(start, start + size)
        results.append(Quantized(part, error, rounded, info.damping, info.attempts > 1, info.dead_columns))
        start += size
    return results


def accumulate(hessian_KK: Tensor, x_MK: Tensor, *, tile: int = 512) -> None:
    """hessian_KK += x^T x, kept up in its upper triangle only (in tiles): half the work. `finish` mirrors it."""
    x_MK = x_MK.to(hessian_KK.dtype)
    for start in range(0, hessian_KK.shape[0], tile):
        rows_KM = x_MK[:, start : start + tile].mT
        hessian_KK[start : start + tile, start:].addmm_(rows_KM, x_MK[:, start:])


def finish(hessian_KK: Tensor, *, tile: int = 512) -> Tensor:
    """Mirror the upper triangle of an accumulated Hessian to the lower one, in place; once, after all tokens."""
    for start in range(0, hessian_KK.shape[0], tile):
        stop = start + tile
        hessian_KK[stop:, start:stop] = hessian_KK[start:stop, stop:].mT
        corner = hessian_KK[start:stop, start:stop]
        corner.copy_(corner.triu().add_(corner.triu(1).mT))
    return hessian_KK
