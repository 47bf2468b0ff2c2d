"""Times of matrix products, memory and links by the roofline model: arithmetic only, no model and no file.

Williams, Waterman and Patterson, Roofline (2009). All results are bounds: a kernel reaches its device's peak or less,
and what is read is read once. Of 8-bit and 4-bit products LOW_PRECISION of the peak is counted: their inputs are
rounded and scaled on the way.

Shapes: N = out features, K = in features. Units: FLOP, bytes, seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit.planner.devices import Device

LOW_PRECISION = 0.9
HOST_STEP = 5e-4  # seconds the host needs to prepare one step while the device does the one before: an assumption
REGIMES = (
    "compute",
    "memory bandwidth",
    "interconnect bandwidth",
    "interconnect latency",
    "host overhead",
    "capacity",
    "scheduler",
)


def ridge(flops: float, bandwidth: float) -> float:
    """FLOP per byte above which products and not memory take the time."""
    return flops / bandwidth


def intensity(N: int, K: int, tokens: int, *, weight_bits: float = 16, io_bits: float = 0) -> float:
    """FLOP per byte of an (N, K) weight times `tokens` inputs.

    weight_bits  of one weight as it is stored; io_bits: of one input and one output, 0: weights alone are counted
    """
    moved = N * K * weight_bits / 8 + tokens * (N + K) * io_bits / 8
    return 2 * N * K * tokens / moved


def all_reduces(layers: int) -> int:
    """All-reduces of one forward pass under tensor parallelism: behind attention and behind the MLP of each layer."""
    return 2 * layers


def all_reduce_bytes(hidden: int, layers: int, itemsize: int = 2) -> int:
    """Bytes of one token that all of them together add up."""
    return all_reduces(layers) * hidden * itemsize


def ring_seconds(nbytes: float, devices: int, bandwidth: float) -> float:
    """Seconds of the bytes of a ring all-reduce: each device sends 2 (devices - 1) / devices of them."""
    return 0.0 if devices == 1 else nbytes * 2 * (devices - 1) / devices / bandwidth


def cost_per_million(price: float, devices: int, tokens_per_second: float) -> float:
    """What a million tokens cost where one device costs `price` an hour."""
    return price * devices / 3600 / tokens_per_second * 1e6


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does on each device.

    flops   by the format that is multiplied; nbytes: that memory moves
    reduces, reduced  all-reduces, and the bytes they add up together
    """

    flops: Mapping[str, float]
    nbytes: float
    reduces: int = 0
    reduced: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step by what they are spent on. Products and memory overlap, links do not, the host runs beside."""

    compute: float
    memory: float
    interconnect_bandwidth: float = 0.0
    interconnect_latency: float = 0.0
    host: float = field(default=HOST_STEP)

    @property
    def device(self) -> float:
        """Seconds of the devices alone."""
        return max(self.compute, self.memory) + self.interconnect_bandwidth + self.interconnect_latency

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)

    @property
    def regime(self) -> str:
        """What takes most of the time, of the first five of REGIMES."""
        if self.host > self.device:
            return "host overhead"
        parts = (self.compute, self.memory, self.interconnect_bandwidth, self.interconnect_latency)
        return REGIMES[parts.index(max(parts))]

    @property
    def interconnect(self) -> float:
        """Seconds of all links."""
        return self.interconnect_bandwidth + self.interconnect_latency


def step(work: Work, device: Device, devices: int = 1) -> Step:
    """The times of one step on `devices` that split each layer."""
    rates = {kind: device.peak(kind) * (LOW_PRECISION if kind in device.peaks else 1) for kind in work.flops}
    rates |= {"bf16": device.peaks["bf16"]}
    return Step(
        sum(flops / rates[kind] for kind, flops in work.flops.items()),
        work.nbytes / device.bandwidth,
        ring_seconds(work.reduced, devices, device.link.bandwidth),
        0.0 if devices == 1 else work.reduces * device.link.latency,
    )
