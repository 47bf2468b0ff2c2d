"""What a plan says of a run, as a dataclass that becomes JSON once."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CalibrationSize:
    """How much calibration text a run reads: samples x seq_len tokens."""

    samples: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a recipe will make of a model and what that takes on this machine.

    weights_seen        whether sizes come from the headers of weights, or from config.json alone
    params, schemes     parameters by kind, quantized linears by scheme
    types               of a GGUF: type -> (tensors, bytes); None for other formats
    bytes_before, bytes_after   tensor data of the model and of the result
    bits_per_weight     of the quantized weights, scales and zero points included
    kv_bytes_per_token  bytes one token takes in the key-value cache of all layers
    calibration         how much text is read; None without any
    memory              bytes at the run's peak by what holds them; peak_memory_bytes is their sum
    disk_bytes          of the result, and of calibration states that do not fit into memory
    seconds             by stage, on a CPU; machine: the one they were estimated for
    problems, advice    why it does not fit, and changes of the recipe that would make it fit; both empty where it does
    warnings            what a run would remark on
    """

    model: str
    model_type: str | None
    weights_seen: bool
    params: dict[str, int]
    linears: int
    schemes: dict[str, int]
    types: dict[str, tuple[int, int]] | None = None
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    kv_cache: str
    kv_bytes_per_token: float
    calibration: CalibrationSize | None
    memory: dict[str, int]
    free_memory_bytes: int
    disk_bytes: int
    free_disk_bytes: int
    seconds: dict[str, float]
    machine: str
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def peak_memory_bytes(self) -> int:
        """Most resident memory of the run's process, libraries included."""
        return sum(self.memory.values())

    @property
    def seconds_total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether this machine has the memory and the disk."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """What `quantkit plan --json` prints."""
        found = asdict(self) | {
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds_total": self.seconds_total,
            "fits": self.fits,
        }
        if self.calibration is not None:
            found["calibration"]["tokens"] = self.calibration.tokens
        return found
