"""What an evaluation found on one text. Everything is a plain number."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its percentile-bootstrap interval (95 %)."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """All three times a positive factor."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def exp(self) -> "Interval":
        """e to the power of all three; a ruined model's loss can be in the thousands: JSON knows no infinity."""
        value, low, high = (math.exp(min(x, 700.0)) for x in (self.value, self.low, self.high))
        return Interval(value, low, high)


@dataclass(frozen=True, slots=True)
class Surprise:
    """How well one model predicts a text: perplexity, bits per byte of it, share of tokens it finds likeliest."""

    perplexity: Interval
    bits_per_byte: Interval
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model's next-token distributions lie from the original's.

    perplexity_ratio  the model's perplexity by the original's
    kl_mean, kl_p99   KL(original || model) in nats: mean and 99th percentile over tokens
    top1_agreement    share of tokens for which both find the same one likeliest
    flips             share of tokens that one of them predicts and the other does not: the sum of the two below
    reference         how well the original predicts the text
    """

    perplexity_ratio: Interval
    kl_mean: Interval
    kl_p99: Interval
    top1_agreement: Interval
    flips: Interval
    right_to_wrong: Interval
    wrong_to_right: Interval
    reference: Surprise


@dataclass(frozen=True, slots=True)
class PositionSurprise:
    """How well the tokens behind `first` to `last` (from 1) tokens of a window are predicted.

    reference  perplexity of the original there; ratio: the model's by the original's, paired by window
    """

    first: int
    last: int
    perplexity: Interval
    reference: Interval | None = None
    ratio: Interval | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The share of a model's guesses that are right when it drafts for its original, greedily.

    draft_tokens   guessed at a time; prompts: pieces of the text, of prompt_tokens each, new_tokens made behind each
    """

    rate: Interval
    draft_tokens: int
    prompts: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class TextResult:
    """What was found on one text. divergence: None without an original; acceptance: where it was asked for.

    name, sha256     of the text as it was read; bytes_per_token: of UTF-8, on average
    windows, tokens  how many windows ran, and how many tokens were predicted in them
    positions        perplexity by the position in a window, first to last
    """

    name: str
    sha256: str
    bytes_per_token: float
    windows: int
    tokens: int
    model: Surprise
    divergence: Divergence | None
    positions: tuple[PositionSurprise, ...] = ()
    acceptance: Acceptance | None = None

    def to_json(self) -> dict[str, Any]:
        """Its entry of the evaluation."""
        found = {
            "text": {"name": self.name, "sha256": self.sha256, "bytes_per_token": self.bytes_per_token},
            "windows": self.windows,
            "tokens": self.tokens,
            **asdict(self.model),
        }
        if (d := self.divergence) is not None:
            found |= {
                "perplexity_ratio": asdict(d.perplexity_ratio),
                "kl": {"mean": asdict(d.kl_mean), "p99": asdict(d.kl_p99)},
                "top1_agreement": asdict(d.top1_agreement),
                "flips": {
                    "rate": asdict(d.flips),
                    "right_to_wrong": asdict(d.right_to_wrong),
                    "wrong_to_right": asdict(d.wrong_to_right),
                },
                "reference": asdict(d.reference),
            }
        if self.acceptance is not None:
            found["acceptance"] = asdict(self.acceptance)
        return found | {"by_position": [asdict(one) for one in self.positions]}
