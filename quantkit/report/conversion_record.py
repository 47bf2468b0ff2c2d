"""What a conversion did: its report; what an importance matrix was made of."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RoundedScales:
    """Scales that a conversion could not keep: in how many modules, how many, and the largest relative change."""

    modules: int
    scales: int
    largest_change: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did.

    source_format, format  before and after; schemes: how many modules (of a GGUF file: tensors) each has
    files                  sha256 by name
    requantized            the mix that all weights were rounded again onto; None where codes and scales are the same
    notes                  what the result does not hold, and what could be smaller
    """

    source: str
    source_format: str
    format: str
    modules: int
    schemes: dict[str, int]
    kv_cache: str | None
    rounded: RoundedScales
    versions: dict[str, str]
    files: dict[str, str]
    requantized: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of quantkit-report.json."""
        rounded = self.rounded
        return {
            "converted": {"source": self.source, "from": self.source_format, "to": self.format},
            "modules": self.modules,
            "schemes": self.schemes,
            "kv_cache": self.kv_cache,
            "rounded": {
                "modules": rounded.modules,
                "scales": rounded.scales,
                "largest_change": rounded.largest_change,
            },
            "requantized": self.requantized,
            "notes": list(self.notes),
            "versions": self.versions,
            "files": self.files,
        }


@dataclass(frozen=True, slots=True)
class ImatrixReport:
    """An importance matrix: entries, one for each tensor; samples windows of seq_len tokens of these sources.

    unreached  tensor of experts -> how many of them no token reached
    """

    output: str
    entries: int
    samples: int
    seq_len: int
    sources: tuple[str, ...]
    unreached: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `quantkit imatrix --json` prints."""
        return asdict(self) | {"sources": list(self.sources)}
