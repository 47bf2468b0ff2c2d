"""Calibration data -> token windows [samples, seq_len]: what a run calibrates on, and windows it does not see.

A text file is one stream of tokens, exactly `tokenizer(text, add_special_tokens=False)`. A file of records (JSON, CSV,
parquet), a folder saved by `datasets`, the set in the wheel and a Hub data set (streamed) give one document per row.

Which windows: seed null takes the first ones and reads no further than that. Any other seed draws from the first
POOL times as many as are asked for, kept in their order; where `samples` is left to auto, from DRAWN_FROM tokens or
twice as many as are asked for. So a source of any size costs bounded time and memory.

Several sources give windows in proportion to their weights (largest remainders), each drawn as it would be alone; they
are interleaved, so that any beginning of the result is mixed as well.

Numbers left to auto shrink to what the data has; one window in sixteen is then left for the check on unseen text.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.quantization.calibration.amount import Amount, amount
from quantkit.quantization.calibration.choice import apportioned, draw, settle
from quantkit.quantization.calibration.given import Given, GivenTokens
from quantkit.quantization.calibration.read_sources import SourceRecord, read_place, read_rows, read_tokens
from quantkit.quantization.calibration.sources import check_sources
from quantkit.recipe.sections import LONGEST, Calibration

POOL = 16  # windows to draw from, per window asked for
DRAWN_FROM = 1 << 20  # tokens, where auto says how many are asked for
FEW_TOKENS = 4096  # fewer are reported: statistics of so few depend on chance

HeldOut = int | Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class CalibrationTokens:
    """What a run calibrates on.

    ids_ST       int64 [samples, seq_len]
    held_out_HT  int64 [windows, seq_len] of the same sources that are not among them; None where there are none
    bos          whether sequences start with the tokenizer's BOS token
    sources      where they come from, in the order of the recipe
    """

    ids_ST: Tensor
    held_out_HT: Tensor | None
    bos: bool
    sources: tuple[SourceRecord, ...]


def token_batches(
    calibration: Calibration,
    tokenizer: Any,
    *,
    max_positions: int | None = None,
    widest: int = 0,
    held_out: HeldOut = 0,
    notes: list[str] | None = None,
    given: Given | None = None,
    vocabulary: int | None = None,
) -> CalibrationTokens:
    """The calibration tokens; the same recipe, data and tokenizer give the same tokens, whatever held_out is.

    max_positions: the model's longest sequence; widest: input features of the widest calibrated linear, for auto;
    held_out: how many windows beside those at most, or a function of (samples, seq_len) that says so; notes: remarks
    for the report are appended; given: data that replaces the recipe's; vocabulary: how many token ids the
    model has.
    Raises UserError for missing, empty, too short, non-UTF-8 or malformed data, naming file and line or byte.
    """
    wanted = amount(calibration, widest=widest, max_positions=max_positions)
    notes = [] if notes is None else notes
    seed, weights = calibration.seed, [1.0]
    if given is None:
        weights = [source.weight for source in calibration.sources()]
        pools = [_pool(wanted, share, seed, held_out) for share in apportioned(wanted.samples, weights)]
        pairs = zip(check_sources(calibration), pools, strict=True)
        sources = [read_place(place, calibration, tokenizer, wanted, pool) for place, pool in pairs]
    elif isinstance(given, GivenTokens):
        seed = None
        source, wanted = read_tokens(given, wanted, _held(held_out, wanted), max_positions or LONGEST)
        sources = [source]
    else:
        sources = [read_rows(given, calibration, tokenizer, wanted, _pool(wanted, wanted.samples, seed, held_out))]
    tokens_given = isinstance(given, GivenTokens)
    samples, seq_len = settle(sources, weights, wanted, hold_back=not tokens_given)
    if not tokens_given and (samples, seq_len) != (wanted.samples, wanted.seq_len):
        notes.append(
            f"calibration: {samples} x {seq_len} tokens are all that {' + '.join(s.record.name for s in sources)} can "
            f"fill; {wanted.samples} x {wanted.seq_len} were wanted (auto)"
        )
    held = held_out if isinstance(held_out, int) else held_out(samples, seq_len)
    chosen, beside = draw(sources, weights, samples, seq_len, held, seed)
    for source in sources:
        notes += source.remarks(seq_len)
    if samples * seq_len < FEW_TOKENS:
        notes.append(
            f"calibration: only {samples * seq_len} tokens ({samples} x {seq_len}): what is measured on so few depends "
            f"on chance; raise calibration.samples or seq_len to {FEW_TOKENS} tokens or more"
        )
    ids_ST = torch.tensor(chosen, dtype=torch.int64)
    held_out_HT = torch.tensor(beside, dtype=torch.int64) if beside else None
    if tokens_given:  # those of the model's own tokenizer are its own
        _check_vocabulary(ids_ST, held_out_HT, vocabulary)
    bos = getattr(tokenizer, "bos_token_id", None)
    starts = bos is not None and bool((ids_ST[:, 0] == bos).all())
    return CalibrationTokens(ids_ST, held_out_HT, starts, tuple(source.record for source in sources))


def data_fingerprint(tokens: Tensor) -> str:
    """sha256 of a token tensor's bytes (int64, contiguous) and shape."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pool(wanted: Amount, share: int, seed: int | None, held_out: HeldOut) -> int:
    """How many windows of a source are read at most."""
    if seed is None:
        return share + _held(held_out, wanted)
    if wanted.auto_samples:
        return min(POOL * share, max(2 * share, DRAWN_FROM // wanted.seq_len))
    return POOL * share


def _held(held_out: HeldOut, wanted: Amount) -> int:
    return held_out if isinstance(held_out, int) else held_out(wanted.samples, wanted.seq_len)


def _check_vocabulary(ids_ST: Tensor, held_out_HT: Tensor | None, vocabulary: int | None) -> None:
    for ids in (ids_ST, held_out_HT):
        if ids is None:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            bad = low if low < 0 else high
            most = "" if vocabulary is None else f" to {vocabulary - 1}"
            raise UserError(
                f"calibration: token id {bad}, where the model has 0{most}\n"
                "hint: use the model's own tokenizer; cut padding off, or give an attention_mask"
            )
