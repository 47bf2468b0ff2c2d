"""Which of several choices to take for each item, so that their harm together is least and their bytes fit: exactly.

Dynamic programming over bytes, as for the knapsack: item by item, every reachable sum of bytes is kept with the least
harm that reaches it, unless it is dominated (another has no more bytes and no more harm) or cannot become the best: the
harm it has plus a Lagrangian bound of what is left would be more than a solution that is known already.
"""

from collections.abc import Sequence

import numpy as np

from quantkit.errors import UserError

Costs = Sequence[Sequence[tuple[int, float]]]  # by item, by choice: bytes, harm
_SLACK = 1e-9  # relative: sums of the same harms differ by their order


def allocate(costs: Costs, budget: int) -> list[int]:
    """The choice of each item with the least sum of harms whose bytes are at most `budget`.

    Of several equally good ones, one with the fewest bytes. UserError where even the smallest choices are too large.
    """
    sizes = [np.array([nbytes for nbytes, _ in row], np.int64) for row in costs]
    harms = [np.array([harm for _, harm in row], np.float64) for row in costs]
    least = sum(int(size.min()) for size in sizes)
    if least > budget:
        raise UserError(f"at least {least:,} bytes are needed, {budget:,} are given")
    price, best = _lagrangian(sizes, harms, budget)
    rest_bytes = np.cumsum([0, *(int(size.min()) for size in sizes[::-1])])[::-1]
    cheapest = [float((harm + price * size).min()) for size, harm in zip(sizes, harms, strict=True)]
    rest_cost = np.cumsum([0.0, *cheapest[::-1]])[::-1]
    limit = best + _SLACK * (abs(best) + price * budget)

    nbytes, harm = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # by item and state: the state before it, the choice
    for i, (size_C, harm_C) in enumerate(zip(sizes, harms, strict=True)):
        all_bytes, all_harm = (nbytes[:, None] + size_C).ravel(), (harm[:, None] + harm_C).ravel()
        bound = all_harm + rest_cost[i + 1] - price * (budget - all_bytes)
        kept = np.flatnonzero((all_bytes + rest_bytes[i + 1] <= budget) & (bound <= limit))
        kept = kept[np.lexsort((all_harm[kept], all_bytes[kept]))]
        below = np.minimum.accumulate(np.concatenate(([np.inf], all_harm[kept][:-1])))
        kept = kept[all_harm[kept] < below]
        nbytes, harm = all_bytes[kept], all_harm[kept]
        trail.append((kept // len(size_C), kept % len(size_C)))
    chosen, state = [], len(nbytes) - 1  # the last has the most bytes and the least harm
    for before, choice in reversed(trail):
        chosen.append(int(choice[state]))
        state = int(before[state])
    return chosen[::-1]


def _lagrangian(sizes: list[np.ndarray], harms: list[np.ndarray], budget: int) -> tuple[float, float]:
    """A price of a byte (not negative) that bounds well, and the harm of a solution that fits.

    For every price, sum of min(harm + price * bytes) - price * budget is at most the least harm.
    """

    def choices(price: float) -> tuple[int, float]:
        picks = [np.lexsort((size, harm + price * size))[0] for size, harm in zip(sizes, harms, strict=True)]
        total = sum(int(size[pick]) for size, pick in zip(sizes, picks, strict=True))
        return total, float(sum(harm[pick] for harm, pick in zip(harms, picks, strict=True)))

    best = float(sum(harm[size == size.min()].min() for size, harm in zip(sizes, harms, strict=True)))
    low, high = 0.0, 1e-12 + max((float(np.ptp(harm)) for harm in harms), default=0.0)  # a byte less, all harm at once
    total, harm = choices(low)
    if total <= budget:
        return low, min(best, harm)
    for _ in range(80):
        middle = (low * high) ** 0.5 if low else high / 1e6
        total, harm = choices(middle)
        if total <= budget:
            high, best = middle, min(best, harm)
        else:
            low = middle
        if low and high / low < 1 + 1e-6:
            break
    return high, best
