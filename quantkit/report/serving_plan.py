"""What a serving plan says: one record for each scheme, and the one to take, as dataclasses that become JSON once.

The JSON of `quantkit plan --gpu --json` is under the key `serving`; its version is SCHEMA.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """One step of a phase on its devices, in seconds.

    compute, memory  overlap; interconnect_bandwidth, interconnect_latency: of all-reduces; host: beside all of it
    seconds          of the step over all pipeline stages; regime: what the phase is bound by
    """

    compute: float
    memory: float
    interconnect_bandwidth: float
    interconnect_latency: float
    host: float
    seconds: float
    regime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeServing:
    """A model served in one scheme.

    scheme, recipe   its name, and the shipped recipe that makes it (None: bf16, or the recipe that was given)
    kv_cache         format of the cache that the times are of
    bits             per quantized weight, scales included
    weight_bytes     of the whole model; weight_bytes_per_device: its share
    weights_fit      whether the weights alone fit; fits: with caches for the asked concurrency too
    max_concurrency  sequences of the asked context that fit, by the cache's format
    ttft_seconds     of one prompt alone; request_seconds: of a request, answers of the others beside it
    token_seconds    between two tokens of a sequence
    decode_tokens_per_second   of all sequences, while none begins
    tokens_per_second          output tokens of all sequences, with the time their prompts take
    cost_per_million_output_tokens, cost_per_million_tokens   the second counts prompts too; None without a price
    refused          why the engine does not run it on the device, None where it does; warnings: what it remarks
    """

    scheme: str
    recipe: str | None
    kv_cache: str
    bits: float
    weight_bytes: int
    weight_bytes_per_device: float
    weights_fit: bool
    fits: bool
    max_concurrency: dict[str, int]
    prefill: PhaseTime
    decode: PhaseTime
    ttft_seconds: float
    token_seconds: float
    request_seconds: float
    decode_tokens_per_second: float
    tokens_per_second: float
    cost_per_million_output_tokens: float | None
    cost_per_million_tokens: float | None
    refused: str | None
    warnings: tuple[str, ...]

    @property
    def able(self) -> bool:
        """Whether the engine runs it there."""
        return self.refused is None


@dataclass(frozen=True, slots=True)
class AdviceRow:
    """One thing to change. rule: which row of the advice it is; change: what to do; why: with figures."""

    rule: str
    change: str
    why: str


@dataclass(frozen=True, slots=True)
class AllReduce:
    """All-reduces under tensor parallelism: `count` a step, of `bytes_per_token` together.

    decode_seconds, prefill_seconds  of a step; decode_share: of a decode step in bf16
    """

    count: int
    bytes_per_token: int
    decode_seconds: float
    prefill_seconds: float
    decode_share: float


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A cache of one format: bytes of a token in all layers, of a sequence by its tokens, and of all that is asked."""

    bytes_per_token: float
    bytes_by_context: dict[str, float]
    bytes_of_all: float


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """A device: bytes, bytes/s, FLOP/s by format, and FLOP per byte above which products take the time.

    usable  bytes that weights and caches may take
    """

    name: str
    memory_bytes: int
    usable_bytes: float
    bandwidth: float
    peaks: Mapping[str, float]
    ridge: Mapping[str, float]
    link: str
    link_bandwidth: float | None
    link_latency: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """How a model is served on devices of one kind, by the roofline model: bounds, not measurements.

    parameters, active_parameters   the second: those that a token passes through
    weights     bytes of all parameters by their size; kv: by the cache's format
    intensity   FLOP per byte of weights, of prefill and decode in bf16
    schemes     bf16 first
    impossible  schemes that this model cannot have, with the reason
    take        what to serve, None where nothing fits; take_why: in a sentence; advice: what else to change
    unknown     what config.json does not say; assumptions: what the figures rest on
    """

    model: str
    model_type: str | None
    device: DeviceFigures
    engine: str
    tp: int
    pp: int
    profile: str | None
    context: int
    concurrency: int
    prompt: int
    output: int
    price: float | None
    parameters: int
    active_parameters: int
    weights: dict[str, float]
    kv: dict[str, CacheSize]
    intensity: dict[str, float]
    all_reduce: AllReduce | None
    schemes: tuple[SchemeServing, ...]
    take: SchemeServing | None
    take_why: str
    advice: tuple[AdviceRow, ...]
    impossible: dict[str, str]
    unknown: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether what is to be taken serves what is asked."""
        return self.take is not None and self.take.fits

    def to_json(self) -> dict[str, Any]:
        """What `quantkit plan --gpu --json` prints."""
        return {"schema": SCHEMA, **asdict(self), "fits": self.fits}
