"""A model and its original on the same questions: the paired difference, flips, and what can be said of them.

Two models answer most questions alike, so the difference of their scores varies far less than either score. Its
interval counts one question more that was lost and one that was gained (half a flip in each cell of the 2 x 2 table:
Agresti and Min 2005), so that no flips among ten questions is not taken for proof.

Shapes: Q = questions.
"""

import math

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import RunError
from quantkit_eval.tasks.results import Comparison, PairedDifference, Verdict

MARGIN = 0.01  # of the original's value: a loss below it is none
Z = 1.959964  # of a 95 % interval
RULE = (
    "recovered: the paired difference is above -1 % of the original's value with 95 % confidence; lost: it is below 0 "
    "with 95 % confidence and not recovered; else cannot tell at this N, as where the original is within two standard "
    "errors of chance"
)


def paired_difference(model_Q: NDArray[np.float64], original_Q: NDArray[np.float64]) -> PairedDifference:
    """The difference of two models' scores on the same questions. RunError where these are not as many."""
    if len(model_Q) != len(original_Q) or not len(model_Q):
        raise RunError(f"{len(model_Q)} and {len(original_Q)} answers cannot be compared")
    d_Q = model_Q - original_Q
    Q = len(d_Q)
    wide = Q + 2
    middle = float(d_Q.sum()) / wide
    half = Z * math.sqrt(float((d_Q**2).sum()) + 1 - wide * middle**2) / wide
    return PairedDifference(
        difference=float(d_Q.mean()),
        stderr=float(d_Q.std(ddof=1)) / math.sqrt(Q) if Q > 1 else None,
        low=middle - half,
        high=middle + half,
        lost=int((d_Q < 0).sum()),
        gained=int((d_Q > 0).sum()),
    )


def verdict(paired: PairedDifference, value: float, stderr: float | None, chance: float) -> Verdict:
    """What RULE says. value, stderr: the original's."""
    if stderr is None or value - chance <= 2 * stderr:
        return "cannot tell"
    if paired.low > -MARGIN * value:
        return "recovered"
    return "lost" if paired.high < 0 else "cannot tell"


def compare(
    value: float, original: float, stderr: float | None, chance: float, *, higher_is_better: bool,
    answers: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
) -> Comparison:  # fmt: skip
    """A model's value beside its original's. answers: the scores [Q] of both, where values are their means."""
    paired = None if answers is None or not higher_is_better else paired_difference(*answers)
    return Comparison(
        value=original,
        stderr=stderr,
        recovery=value / original if higher_is_better and original > 0 else None,
        above_chance=(value - chance, original - chance),
        paired=paired,
        verdict=None if paired is None else verdict(paired, original, stderr, chance),
    )
