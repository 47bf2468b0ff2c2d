"""A benchmark: the engine before and after each baseline (A B A C A), in one process."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.library_output import quiet_libraries
from quantkit.runtime.engine.llm import LLM
from quantkit_eval.bench.baselines import Transformers
from quantkit_eval.bench.engine_run import EngineRun, run
from quantkit_eval.bench.llama_bench import llama_bench
from quantkit_eval.bench.machine import ModelCost, Peak, measure_peak, model_cost
from quantkit_eval.bench.options import TRANSFORMERS, BenchOptions, Scenario
from quantkit_eval.bench.profiling import profile
from quantkit_eval.bench.regime import phases, regime
from quantkit_eval.bench.results import Benchmark, Compared, Measured, Sample
from quantkit_eval.bench.statistics import Latencies, Timeline
from quantkit_eval.bench.workload import Arrival, workload
from quantkit_eval.evaluation import versions
from quantkit_eval.texts import read_text

LOG = logging.getLogger("quantkit.bench")
WARM_REQUESTS, WARM_TOKENS = 8, 4  # of the run that is not counted
BUSY = 0.8  # share of the clock's time, below which a run had less than a processor for itself
SOURCE_CHARACTERS = 1 << 18  # of the text that prompts are pieces of
PACKAGES = ("quantkit", "torch", "transformers")
Tokens = tuple[list[list[int]], list[Timeline]]  # of each request


def benchmark(options: BenchOptions, *, trace: Path | None = None) -> Benchmark:
    """Measure what `options` says. trace: a new file for a torch.profiler trace of a short run.

    UserError for models that cannot be run; RunError where a request fails.
    """
    started = time.perf_counter()
    LOG.info("loading %s", options.model)
    llm = engine(options, options.model)
    others = {name: engine(options, name) for name in options.baselines if name not in TRANSFORMERS}
    plain = None
    if set(options.baselines) & set(TRANSFORMERS):
        plain = Transformers(options.model, options.dtype, options.device, options.trust_remote_code)
    source = prompt_source([llm, *others.values()], options.seed)
    peak = measure_peak(llm.runner.model.dtype, llm.runner.device)
    cost = model_cost(llm)
    measured: list[Measured] = []
    requests: list[Arrival] = []
    for scenario in options.scenarios:
        requests = workload(scenario, source, rate=options.rate, shared_prefix=options.shared_prefix, seed=options.seed)
        runs = {name: _other(each, scenario) for name, each in others.items()}
        if plain is not None:
            named = [name for name in options.baselines if name in TRANSFORMERS]
            runs |= {name: _plain(plain, name) for name in named}
        measured.append(compare(llm, cost, peak, scenario, requests, {name: runs[name] for name in options.baselines}))
    on_cpu = llm.runner.device.type == "cpu"
    notes = tuple(busy_note([sample for each in measured for sample in each.samples])) if on_cpu else ()
    profiled = () if trace is None else profile(llm, _short(requests), trace)
    bench = () if options.llamacpp is None else llama_bench(options.llamacpp, options.model, options.scenarios)
    return Benchmark(
        options.model, _plain_data(options), str(llm.runner.device), torch.get_num_threads(), peak.dtype,
        cache_text(llm), peak, tuple(measured), bench, profiled, time.perf_counter() - started, versions(PACKAGES),
        notes,
    )  # fmt: skip


def engine(options: BenchOptions, model: str) -> LLM:
    """The paged engine with a model, for these options."""
    slots = max(scenario.slots or options.max_num_seqs for scenario in options.scenarios)
    own = model == options.model
    with quiet_libraries():
        return LLM(
            model, options.dtype, options.kv_cache, slots, options.max_num_batched_tokens,
            options.enable_prefix_caching, num_blocks=options.num_blocks, max_model_len=options.longest,
            speculate=options.speculate, draft=options.draft if own else None, device=options.device,
            seed=options.seed, trust_remote_code=options.trust_remote_code,
        )  # fmt: skip


def cache_text(llm: LLM) -> str:
    """The formats of cached keys and values, one where they are the same."""
    assert llm.runner.cache is not None
    pages = next(iter(llm.runner.cache.layers.values()))
    names = [str(side.dtype).removeprefix("torch.") if side.spec is None else str(side.spec) for side in pages]
    return names[0] if names[0] == names[1] else f"keys {names[0]}, values {names[1]}"


def prompt_source(engines: Sequence[LLM], seed: int) -> list[int]:
    """Tokens that prompts are cut from: of quantkit's held-out texts, or random ones where there is no tokenizer."""
    most = min(llm.vocabulary for llm in engines)
    if (tokenizer := engines[0].tokenizer) is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(most, (1 << 16,), generator=generator).tolist()
    text = read_text("general").content[:SOURCE_CHARACTERS]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
    return [token % most for token in ids]


def compare(
    llm: LLM, cost: ModelCost, peak: Peak, scenario: Scenario, requests: list[Arrival],
    baselines: dict[str, Callable[[list[Arrival]], Tokens]],
) -> Measured:  # fmt: skip
    """The engine, and each baseline between two runs of it, each after a short run that is not counted."""
    for name, each in baselines.items():
        LOG.info("%s: warming up %s", scenario.name, name)
        each(_short(requests))
    run(llm, _short(requests), cost, slots=scenario.slots)
    runs, samples, compared = list[EngineRun](), list[Sample](), list[Compared]()

    def measured() -> Tokens:
        runs.append(run(llm, requests, cost, slots=scenario.slots))
        return runs[-1].outputs, runs[-1].timelines

    samples.append(_timed(scenario, "engine", measured)[1])
    for name, each in baselines.items():
        (outputs, timelines), sample = _timed(scenario, name, partial(each, requests))
        samples.append(_timed(scenario, "engine", measured)[1])
        same = sum(one == other for one, other in zip(outputs, runs[0].outputs, strict=True))
        compared.append(compared_to(name, sample, samples[-2:], same, Latencies.of(timelines)))
    steps = [phases(each.steps) for each in runs]
    prefill, decode = (
        regime([step for pair in steps for step in pair[side]], peak.flops, peak.copy_bytes) for side in (0, 1)
    )
    drafted, accepted = (sum(getattr(each, name) for each in runs) for name in ("drafted", "accepted"))
    blocks = llm.scheduler.blocks
    return Measured(
        scenario, sum(len(request.prompt) for request in requests), sum(request.output for request in requests),
        Latencies.of([line for each in runs for line in each.timelines]), prefill, decode,
        max(each.memory for each in runs), max(each.blocks for each in runs), blocks.blocks, blocks.block_size,
        llm.block_bytes, runs[-1].hits, max(each.preemptions for each in runs), drafted,
        accepted / drafted if drafted else None, tuple(samples), tuple(compared),
    )  # fmt: skip


def _timed(scenario: Scenario, name: str, work: Callable[[], Tokens]) -> tuple[Tokens, Sample]:
    LOG.info("%s: %s", scenario.name, name)
    clock, processor = time.perf_counter(), time.process_time()
    made = work()
    return made, Sample.of(made[1], time.perf_counter() - clock, time.process_time() - processor)


def compared_to(name: str, sample: Sample, around: Sequence[Sample], same: int, latencies: Latencies) -> Compared:
    """A baseline's run beside the engine's runs around it."""
    speed, processor = (
        sum(getattr(each, field) for each in around) / len(around)
        for field in ("tokens_per_second", "processor_seconds")
    )
    speedup = speed / sample.tokens_per_second if sample.tokens_per_second else 0.0
    ratio = sample.processor_seconds / processor if processor else 0.0
    return Compared(name, speedup, ratio, same, latencies, sample)


def busy_note(samples: Sequence[Sample]) -> list[str]:
    """A remark where other programs had much of the machine while the engine ran."""
    clock, processor = (sum(getattr(each, field) for each in samples) for field in ("seconds", "processor_seconds"))
    if processor >= BUSY * clock:
        return []
    return [
        f"other programs were busy: the engine had a processor {processor / clock:.0%} of the time, so compare its "
        "times with others of this run alone"
    ]


def _other(llm: LLM, scenario: Scenario) -> Callable[[list[Arrival]], Tokens]:
    def timed(requests: list[Arrival]) -> Tokens:
        found = run(llm, requests, model_cost(llm), slots=scenario.slots)
        return found.outputs, found.timelines

    return timed


def _plain(model: Transformers, kind: str) -> Callable[[list[Arrival]], Tokens]:
    def timed(requests: list[Arrival]) -> Tokens:
        found = model.run(kind, requests)
        return found.outputs, found.timelines

    return timed


def _short(requests: list[Arrival]) -> list[Arrival]:
    return [replace(each, output=min(each.output, WARM_TOKENS), time=0.0) for each in requests[:WARM_REQUESTS]]


def _plain_data(options: BenchOptions) -> dict[str, Any]:
    """The options as JSON takes them, without what is said elsewhere."""
    found = asdict(options)
    del found["model"], found["scenarios"]
    return found | {"llamacpp": None if options.llamacpp is None else str(options.llamacpp)}
