"""What `quantkit auto` made: the choice of candidates, its size, and the KL that was predicted and measured."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CandidateShare:
    """What one candidate was chosen for: linears, and their share of the weights in all linears of the blocks."""

    candidate: str
    linears: int
    share: float


@dataclass(frozen=True, slots=True)
class AllocationRecord:
    """A result of `quantkit auto`.

    max_size         as it was asked for
    bits_per_weight  of all linears of the blocks, those that stay as stored included; nbytes: of all safetensors files
    predicted_kl     sum of the harms of the linears, each quantized alone, times the share that re-fitting leaves of
                     them; measured_kl: of the result, on the same windows of the calibration text, which it was not
                     calibrated on. Nats per token
    measured_tokens  of these windows; warnings: of the run
    """

    output: str
    max_size: str
    bits_per_weight: float
    nbytes: int
    predicted_kl: float
    measured_kl: float
    measured_tokens: int
    shares: tuple[CandidateShare, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Measured to predicted; 1 where both are 0."""
        return self.measured_kl / self.predicted_kl if self.predicted_kl else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `quantkit auto --json` prints."""
        lists = {"shares": [asdict(share) for share in self.shares], "warnings": list(self.warnings)}
        return asdict(self) | lists | {"ratio": self.ratio}
