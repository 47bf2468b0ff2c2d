"""A torch.profiler trace of a short run, and its seconds by kind of work."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import SamplingParams
from quantkit.runtime.quant_linear import QuantLinear
from quantkit_eval.bench.results import KindOfWork
from quantkit_eval.bench.workload import Arrival

# Kind of work -> parts of the names of operators that are of it, the first that fits.
KINDS = {
    "attention": ("attention", "softmax", "sdpa"),
    "products": ("mm", "matmul", "linear"),
    "cache and copies": ("index", "copy", "cat", "gather", "scatter", "to_copy", "fill", "zero"),
    "choice of tokens": ("argmax", "multinomial", "sort", "topk", "cumsum"),
    "elementwise": ("mul", "add", "sub", "div", "silu", "gelu", "pow", "rsqrt", "mean", "sqrt", "neg", "cos", "sin"),
}
OTHER, OUTSIDE = "other operators", "Python between operators: the model's and the engine's"


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
    with _named(llm), torch_profile(activities=activities) as profiled:
        while llm.unfinished:
            llm.step()
    total = time.perf_counter() - began
    profiled.export_chrome_trace(str(trace))
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    return by_kind(((event.key, getattr(event, field) / 1e6) for event in profiled.key_averages()), total)


@contextmanager
def _named(llm: LLM) -> Iterator[None]:
    """Give the time of kernels that torch does not see to the module that calls them: packed linears, attention."""
    begun: list[record_function] = []

    def begin(name: str) -> None:
        begun.append(record_function(name))
        begun[-1].__enter__()

    def end(*_: Any) -> None:
        begun.pop().__exit__(None, None, None)

    with ExitStack() as undo:
        for module in llm.runner.model.modules():
            if isinstance(module, QuantLinear) or (
                hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
            ):
                name = "quantkit::linear" if isinstance(module, QuantLinear) else "quantkit::attention"
                undo.callback(module.register_forward_pre_hook(lambda *_, name=name: begin(name)).remove)
                undo.callback(module.register_forward_hook(end).remove)
        yield
