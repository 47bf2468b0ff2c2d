"""What an evaluation found. Everything is a plain number; `to_json` is what `quantkit eval --json` prints."""

from dataclasses import dataclass
from typing import Any

from quantkit.report.text_results import Acceptance, Divergence, Interval, PositionSurprise, Surprise, TextResult

__all__ = ["Acceptance", "Divergence", "Evaluation", "Interval", "PositionSurprise", "Surprise", "TextResult"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found of one model on one or several texts.

    model, ref  as they were given: folders or Hub ids; ref None: no original to compare with
    context     tokens of a window; bos: whether each begins with the tokenizer's begin-of-sequence token
    engine      what ran the model; None: transformers
    kv_cache    the formats of cached keys and values as they were given; None: those that the model's folder says
    notes       what is worth knowing about the figures, a line each
    """

    model: str
    ref: str | None
    context: int
    bos: bool
    texts: tuple[TextResult, ...]
    device: str
    dtype: str
    seconds: float
    versions: dict[str, str]
    engine: str | None = None
    kv_cache: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `quantkit eval --json` prints."""
        return {
            "model": self.model,
            "ref": self.ref,
            "context": self.context,
            "bos": self.bos,
            "texts": [text.to_json() for text in self.texts],
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "versions": self.versions,
            "engine": self.engine,
            "kv_cache": self.kv_cache,
            "notes": list(self.notes),
        }
