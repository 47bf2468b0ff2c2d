"""The accelerators that serving is planned for: memory, bandwidth, peaks and links, each with its source.

Peaks are those of dense matrix products in FLOP/s (sparsity, which data sheets like to count, halves them); 8-bit and
4-bit floats accumulate in float32. Memory of a GPU is counted in GiB, as its driver reports it, whatever unit its data
sheet prints. Links are one direction. The latency of an all-reduce is an assumption, the same for all devices of a
link: a one-shot all-reduce over peer memory takes about 2 us, one through the host's PCIe about 8 us.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantkit.errors import UserError
from quantkit.suggestions import nearest
from quantkit.verification.engines.hardware import plain_name

GIB = 1 << 30
T = 1e12
PEER_SECONDS, HOST_SECONDS = 2e-6, 8e-6  # of one small all-reduce
CPU_SIDE, CPU_SECONDS, CPU_BYTES = 1024, 0.15, 256 << 20

NVIDIA = "https://www.nvidia.com/en-us/data-center"
ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"


@dataclass(frozen=True, slots=True)
class Link:
    """Between devices: bytes/s in one direction, and seconds of an all-reduce that moves next to nothing."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator.

    memory     bytes; bandwidth: of it, bytes/s
    peaks      FLOP/s by the format that is multiplied: bf16, fp8, int8, fp4; a format without a peak has no unit there
    source     where the figures are from
    """

    name: str
    memory: int
    bandwidth: float
    peaks: Mapping[str, float]
    link: Link
    source: str

    def peak(self, kind: str) -> float:
        """FLOP/s of products in that format; of bf16 where the device has no unit for it."""
        return self.peaks.get(kind, self.peaks["bf16"])


def _nvlink(gigabytes: int) -> Link:
    return Link("NVLink", gigabytes * 1e9, PEER_SECONDS)


def _pcie(gigabytes: int) -> Link:
    return Link("PCIe", gigabytes * 1e9, HOST_SECONDS)


def _fabric(gigabytes: int) -> Link:
    return Link("Infinity Fabric", gigabytes * 1e9, PEER_SECONDS)


def _row(
    name: str,
    gib: int,
    tb: float,
    bf16: float,
    fp8: float | None,
    int8: float,
    fp4: float | None,
    link: Link,
    source: str,
) -> Device:
    """GiB, TB/s, and peaks in TFLOP/s."""
    peaks = {"bf16": bf16, "fp8": fp8, "int8": int8, "fp4": fp4}
    return Device(name, gib * GIB, tb * T, {k: v * T for k, v in peaks.items() if v is not None}, link, source)


# The names are those that `quantkit verify --hardware` takes. The T4 multiplies float16 where others take bfloat16.
DEVICES = {
    device.name: device
    for device in (
        _row("h100", 80, 3.35, 989.5, 1979, 1979, None, _nvlink(450), f"{NVIDIA}/h100/ (SXM)"),
        _row("h200", 141, 4.8, 989.5, 1979, 1979, None, _nvlink(450), f"{NVIDIA}/h200/ (SXM)"),
        _row("b200", 180, 8.0, 2250, 4500, 4500, 9000, _nvlink(900), f"{NVIDIA}/dgx-b200/ (an eighth of it)"),
        _row("gb200", 186, 8.0, 2500, 5000, 5000, 10000, _nvlink(900), f"{NVIDIA}/gb200-nvl72/ (one GPU of 72)"),
        _row("a100", 80, 2.039, 312, None, 624, None, _nvlink(300), f"{NVIDIA}/a100/ (80 GB, SXM)"),
        _row("a10", 24, 0.6, 125, None, 250, None, _pcie(32), f"{NVIDIA}/products/a10-gpu/"),
        _row("l4", 24, 0.3, 121, 242.5, 242.5, None, _pcie(32), f"{NVIDIA}/l4/"),
        _row("l40s", 48, 0.864, 362, 733, 733, None, _pcie(32), f"{NVIDIA}/l40s/"),
        _row("t4", 16, 0.3, 65, None, 130, None, _pcie(16), f"{NVIDIA}/tesla-t4/"),
        _row("rtx3090", 24, 0.936, 71, None, 284, None, _pcie(32), "NVIDIA GA102 GPU architecture whitepaper, table 2"),
        _row("rtx4090", 24, 1.008, 165.2, 330.3, 660.6, None, _pcie(32), ADA),
        _row(
            *("rtx5090", 32, 1.792, 209.5, 419, 838, 1676, _pcie(64)),
            "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A",
        ),
        _row(
            *("mi300x", 192, 5.3, 1307.4, 2614.9, 2614.9, None, _fabric(448)),
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
        ),
        _row(
            *("mi325x", 256, 6.0, 1307.4, 2614.9, 2614.9, None, _fabric(448)),
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html",
        ),
        _row(
            *("mi355x", 288, 8.0, 2516.6, 5033.2, 5033.2, 10066.3, _fabric(537)),
            "https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html",
        ),
    )
}
NAMES = (*DEVICES, "cpu")


def check_device(name: str) -> str:
    """The name in `NAMES` that is meant, in any spelling; UserError with the nearest ones for any other."""
    plain = plain_name(name)
    found = next((known for known in NAMES if plain in (known, known.removeprefix("rtx"))), None)
    if found is None:
        near = nearest(plain, NAMES)
        hint = f"did you mean `{near}`? " if near else ""
        raise UserError(f"unknown GPU {name!r}\nhint: {hint}there are {', '.join(NAMES)}")
    return found


def device_named(name: str) -> Device:
    """The device of that name; `cpu` is measured, which takes about a second. UserError for an unknown name."""
    found = check_device(name)
    return measured_cpu() if found == "cpu" else DEVICES[found]


def measured_cpu() -> Device:
    """This machine's CPU: its memory, and what torch reaches in products of bfloat16 and int8 and in reading memory."""
    import psutil
    import torch

    own = torch.Generator().manual_seed(0)  # the caller's random numbers go on as if nothing had been drawn
    a, b = torch.randn(2, CPU_SIDE, CPU_SIDE, generator=own).bfloat16()
    peaks = {"bf16": _rate(lambda: torch.mm(a, b), 2.0 * CPU_SIDE**3)}
    whole = torch.randint(-8, 8, (CPU_SIDE, CPU_SIDE), generator=own, dtype=torch.int8)
    peaks["int8"] = _rate(
        lambda: torch._int_mm(whole, whole),  # pyright: ignore[reportPrivateImportUsage]
        2.0 * CPU_SIDE**3,
    )
    read = torch.zeros(CPU_BYTES // 4)
    bandwidth = _rate(lambda: torch.sum(read), CPU_BYTES)
    source = f"measured on this machine, {torch.get_num_threads()} threads"
    return Device("cpu", psutil.virtual_memory().total, bandwidth, peaks, Link("none", float("inf"), 0.0), source)


def _rate(run: Callable[[], object], work: float) -> float:
    """Work per second of the fastest of some runs: others slow this machine down, nobody speeds it up."""
    run()
    begin, best = time.perf_counter(), float("inf")
    while (started := time.perf_counter()) - begin < CPU_SECONDS or math.isinf(best):
        run()
        best = min(best, time.perf_counter() - started)
    return work / best
