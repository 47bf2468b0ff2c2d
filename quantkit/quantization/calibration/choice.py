"""Which windows of which source: shares by weight, numbers left to auto, the draw. Lists of ids, no tensors."""

import random
from collections.abc import Sequence

from quantkit.errors import UserError
from quantkit.quantization.calibration.amount import SHORTEST, Amount
from quantkit.quantization.calibration.read_sources import ReadSource
from quantkit.quantization.calibration.windows import Sequences

HELD_BACK = 16  # where auto takes all there is, one window in so many is left for the check on unseen text


def apportioned(samples: int, weights: Sequence[float]) -> list[int]:
    """How many of the samples each source gives, at least one each: largest remainders, the first of equal ones.

    UserError for fewer samples than sources.
    """
    if samples < len(weights):
        raise UserError(
            f"calibration: {samples} samples for {len(weights)} sources, at least one each is expected\n"
            "hint: raise calibration.samples, or name fewer sources"
        )
    exact = [samples * weight / sum(weights) for weight in weights]
    shares = [max(1, int(part)) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: max(0, samples - sum(shares))]:
        shares[i] += 1
    for _ in range(sum(shares) - samples):  # sources with less than one sample were given one: the largest pays
        shares[shares.index(max(shares))] -= 1
    return shares


def settle(
    sources: Sequence[ReadSource], weights: Sequence[float], wanted: Amount, *, hold_back: bool = True
) -> tuple[int, int]:
    """(samples, seq_len) that the sources can fill: numbers left to auto shrink, given ones are held to.

    UserError, with numbers that would fit, where the data is too short for what is given.
    """
    samples, seq_len = wanted.samples, wanted.seq_len
    shares = apportioned(samples, weights)
    if wanted.auto_seq_len:
        pairs = zip(sources, shares, strict=True)
        seq_len = min(
            source.material.best(seq_len, share * seq_len)
            if wanted.auto_samples
            else min(seq_len, source.material.longest(share))
            for source, share in pairs
        )
    if seq_len < SHORTEST:
        worst = min(zip(sources, shares, strict=True), key=lambda pair: pair[0].material.longest(pair[1]))
        raise too_short(worst[0], 1 if wanted.auto_samples else worst[1], SHORTEST)
    if wanted.auto_samples and seq_len != wanted.seq_len:
        samples = -(-wanted.tokens // seq_len)
        shares = apportioned(samples, weights)
    have = [len(source.windows(seq_len)) for source in sources]
    lacking = next((i for i, share in enumerate(shares) if have[i] < share), None)
    if lacking is None:
        return samples, seq_len
    fitting = _most(have, weights) if wanted.auto_samples else 0
    if not fitting:
        raise too_short(sources[lacking], 1 if wanted.auto_samples else shares[lacking], seq_len)
    return fitting - (fitting // HELD_BACK if hold_back else 0), seq_len


def _most(have: Sequence[int], weights: Sequence[float]) -> int:
    """The greatest number of samples whose shares there are; 0 where a source has no window at all."""
    total = sum(weights)
    most = min(int(count * total / weight) for count, weight in zip(have, weights, strict=True)) + len(have)
    for samples in range(most, len(have) - 1, -1):
        if all(share <= count for share, count in zip(apportioned(samples, weights), have, strict=True)):
            return samples
    return 0


def draw(
    sources: Sequence[ReadSource], weights: Sequence[float], samples: int, seq_len: int, held: int, seed: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """The windows chosen, and up to `held` others, both mixed in proportion to the weights.

    seed: None takes the first ones. The others are drawn after the chosen ones, which do not depend on them.
    """
    chosen, beside = list[list[list[int]]](), list[list[list[int]]]()
    held_shares = apportioned(held, weights) if held >= len(weights) else [held, *(0 for _ in weights[1:])]
    for source, share, held_share in zip(sources, apportioned(samples, weights), held_shares, strict=True):
        windows = source.windows(seq_len)
        if seed is None:
            first, rest = list(range(share)), list(range(share, len(windows)))[:held_share]
        else:
            generator = random.Random(seed)
            first = sorted(generator.sample(range(len(windows)), share))
            taken = set(first)
            left = [i for i in range(len(windows)) if i not in taken]
            rest = sorted(generator.sample(left, min(held_share, len(left))))
        chosen.append([windows[i] for i in first])
        beside.append([windows[i] for i in rest])
    return _interleaved(chosen), _interleaved(beside)


def _interleaved(lists: list[list[list[int]]]) -> list[list[int]]:
    """All windows, so that any beginning holds about the same part of each list."""
    places = [((k + 0.5) / len(each), i, window) for i, each in enumerate(lists) for k, window in enumerate(each)]
    return [window for _, _, window in sorted(places, key=lambda place: place[:2])]


def too_short(source: ReadSource, samples: int, seq_len: int) -> UserError:
    """What to raise for a source that does not have so many windows of this length, with numbers that would fit."""
    name, material = source.record.name, source.material
    have = len(source.windows(seq_len))
    hint = "\nhint: lower calibration.samples or calibration.seq_len, or leave them to auto"
    if isinstance(material, Sequences):
        count = len(material.items) + material.left_out
        longest = max([material.longest_left_out, *map(len, material.items)])
        have = sum(len(item) >= seq_len for item in material.items)
        if not count:
            return UserError(f"{name}: there is no text in it")
        kind = "sequences" if material.split else "documents"
        other = "" if material.split else ", or packing: concat, which joins documents"
        return UserError(
            f"{name}: {have} of {count} {kind} have {seq_len} tokens, {samples} are needed; the longest has {longest}. "
            f"Ask for fewer samples, a shorter seq_len{other}{hint}"
        )
    tokens = len(material.ids)
    if not tokens:
        return UserError(f"{name}: there is no text in it")
    fits = [f"samples: {have}"] if have else []
    if (length := material.longest(samples)) >= SHORTEST:
        fits.append(f"seq_len: {length}")
    advice = f"; {' or '.join(fits)} would fit" if fits else "; give a longer text, or lower samples and seq_len"
    needed = f"{samples} x {seq_len} = {samples * seq_len} are needed"
    return UserError(f"{name}: {tokens} tokens, {needed}{advice}{hint}")
