"""How many calibration tokens a run takes: numbers for what the recipe leaves to `auto`. No torch here."""

from dataclasses import dataclass

from quantkit.errors import UserError
from quantkit.recipe.sections import Calibration

PER_FEATURE = 32  # tokens per input feature of the widest linear: beyond, GPTQ gains little
LEAST, MOST = 1 << 15, 1 << 20  # tokens in all
WINDOW = 2048
SHORTEST = 8  # tokens of a window, as in the recipe


@dataclass(frozen=True, slots=True)
class Amount:
    """samples windows of seq_len tokens; the flags say which of the two numbers the recipe left to `auto`."""

    samples: int
    seq_len: int
    auto_samples: bool
    auto_seq_len: bool

    @property
    def tokens(self) -> int:
        """samples x seq_len."""
        return self.samples * self.seq_len


def amount(calibration: Calibration, *, widest: int, max_positions: int | None = None) -> Amount:
    """What a recipe's calibration section asks for, before anything is known of its data.

    widest: input features of the widest calibrated linear; max_positions: the model's longest sequence.
    auto: 32 tokens per feature, from 32768 to 1048576 in all, in windows of min(2048, max_positions). A number beside
    an `auto` stays as it is: with samples given, auto seq_len is still that window; with seq_len given, auto samples
    are as many as make up those tokens. UserError where seq_len is above max_positions.
    """
    seq_len, samples = calibration.seq_len, calibration.samples
    auto_seq_len, auto_samples = seq_len == "auto", samples == "auto"
    if seq_len == "auto":
        seq_len = min(WINDOW, max_positions or WINDOW)
    elif max_positions is not None and seq_len > max_positions:
        raise UserError(f"calibration.seq_len {seq_len} is above the model's longest sequence: at most {max_positions}")
    if samples == "auto":
        samples = -(-min(max(PER_FEATURE * widest, LEAST), MOST) // seq_len)
    return Amount(samples, seq_len, auto_samples, auto_seq_len)
