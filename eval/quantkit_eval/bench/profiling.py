"""A torch.profiler trace of a short run, and its seconds by kind of work."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import SamplingParams
from quantkit_eval.bench.results import KindOfWork
from quantkit_eval.bench.workload import Arrival

# Kind of work -> parts of the names of operators that are of it, the first that fits.
KINDS = {
    "attention": ("attention", "softmax", "sdpa"),
    "products": ("mm", "matmul", "linear", "quantkit"),
    "cache and copies": ("index", "copy", "cat", "gather", "scatter", "to_copy", "fill", "zero"),
    "choice of tokens": ("argmax", "multinomial", "sort", "topk", "cumsum"),
    "elementwise": ("mul", "add", "sub", "div", "silu", "gelu", "pow", "rsqrt", "mean", "sqrt", "neg", "cos", "sin"),
}
OTHER, OUTSIDE = "other operators", "outside torch's operators: Python, and kernels it does not see"


def kind_of(name: str) -> str:
    """The kind of an operator by its name, like aten::addmm."""
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), OTHER)


def by_kind(operators: Iterable[tuple[str, float]], total: float) -> tuple[KindOfWork, ...]:
    """Seconds by kind, most first. operators: names and their own seconds; total: seconds of all that happened."""
    seconds: dict[str, float] = {}
    for name, own in operators:
        seconds[kind_of(name)] = seconds.get(kind_of(name), 0.0) + own
    seconds[OUTSIDE] = max(0.0, total - sum(seconds.values()))
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return tuple(KindOfWork(kind, spent, spent / total if total else 0.0) for kind, spent in ranked)


def profile(llm: LLM, requests: Sequence[Arrival], trace: Path) -> tuple[KindOfWork, ...]:
    """Run the requests under the profiler, write `trace` in Chrome's format, and say where its time went."""
    cuda = llm.runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for request in requests:
        llm.add(request.prompt, SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True))
    began = time.perf_counter()
    with torch_profile(activities=activities) as profiled:
        while llm.unfinished:
            llm.step()
    total = time.perf_counter() - began
    profiled.export_chrome_trace(str(trace))
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    return by_kind(((event.key, getattr(event, field) / 1e6) for event in profiled.key_averages()), total)
