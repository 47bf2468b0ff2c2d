"""Requests through the engine: tokens of `generate`, arrivals in virtual time, what each step says of itself."""

import random
import time
from pathlib import Path

import pytest
import torch
from quantkit_eval.bench.baselines import Transformers
from quantkit_eval.bench.engine_run import VirtualClock, run
from quantkit_eval.bench.machine import measure_peak, model_cost
from quantkit_eval.bench.workload import Arrival

from quantkit import LLM
from quantkit.errors import UserError

MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"


def requests(count: int, output: int = 6) -> list[Arrival]:
    choose = random.Random(0)
    sizes = [choose.randint(3, 40) for _ in range(count)]
    return [Arrival([choose.randrange(3, 4096) for _ in range(size)], output + size % 2, 0.0) for size in sizes]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, "float32", max_num_seqs=3, block_size=16)


def test_the_clock_jumps_and_never_goes_back() -> None:
    now = [5.0]
    clock = VirtualClock(lambda: now[0])
    now[0] = 6.0
    assert clock() == 1.0
    clock.wait_until(3.0)
    assert clock() == 3.0
    clock.wait_until(2.0)
    now[0] = 6.5
    assert clock() == 3.5


def test_each_step_is_recorded(llm: LLM) -> None:
    every, cost = requests(5), model_cost(llm)
    found = run(llm, every, cost)
    assert [len(tokens) for tokens in found.outputs] == [each.output for each in every]
    assert sum(step.prompt_tokens for step in found.steps) == sum(len(each.prompt) for each in every)
    total = sum(len(each.prompt) + each.output - 1 for each in every)  # the last token is never computed
    assert sum(step.tokens for step in found.steps) == total
    assert all(step.sequences <= step.slots == 3 for step in found.steps)
    assert max(step.waiting for step in found.steps) == 2
    assert all(0 < step.model_seconds <= step.seconds for step in found.steps)
    assert 0 < found.blocks <= llm.scheduler.blocks.blocks
    assert found.memory > 0
    assert not hasattr(llm.scheduler.schedule, "__wrapped__")
    assert llm.unfinished == 0
    llm.scheduler.check()


def test_nothing_is_left_of_the_run_before(llm: LLM) -> None:
    """Prompts of the last run are not found in the cache; those of this run are."""
    shared = Arrival(list(range(3, 40)), 4, 0.0)
    for _ in range(2):
        assert run(llm, [shared], model_cost(llm)).hits == 0
    assert run(llm, [shared, *requests(3), shared], model_cost(llm)).hits == 32  # two blocks of 16


def test_baselines_give_the_engines_tokens(llm: LLM) -> None:
    every = requests(10)
    wanted = run(llm, every, model_cost(llm))
    plain = Transformers(str(MODEL), "float32", "cpu")
    for kind in ("generate", "batched", "generate_batch"):
        found = plain.run(kind, every)
        assert found.outputs == wanted.outputs, kind
        for each, line in zip(every, found.timelines, strict=True):
            assert len(line.tokens) == each.output
            assert list(line.tokens) == sorted(line.tokens)
            assert line.tokens[0] > line.arrival


def test_arrivals_are_in_virtual_time(llm: LLM) -> None:
    """Ten minutes between requests pass at once, and no request waits for the others."""
    every = [Arrival(each.prompt, each.output, 600.0 * index) for index, each in enumerate(requests(3))]
    began = time.perf_counter()
    for found in (run(llm, every, model_cost(llm)), Transformers(str(MODEL), "float32", "cpu").run("batched", every)):
        for index, line in enumerate(found.timelines):
            assert line.arrival == 600.0 * index <= line.tokens[0] <= line.tokens[-1] < 600.0 * index + 60
    assert time.perf_counter() - began < 60


def test_slots(llm: LLM) -> None:
    found = run(llm, requests(3), model_cost(llm), slots=1)
    assert max(step.sequences for step in found.steps) == 1
    assert llm.scheduler.max_num_seqs == 3


def test_blocks_that_are_short_are_noted() -> None:
    llm = LLM(MODEL, "float32", block_size=16, num_blocks=4, max_model_len=64, enable_prefix_caching=False)
    found = run(llm, [Arrival(list(range(3, 43)), 6, 0.0)] * 3, model_cost(llm))
    assert any(step.no_blocks for step in found.steps)
    assert not any(step.no_blocks for step in found.steps if not step.waiting)


def test_a_request_that_is_refused_ends_the_run(llm: LLM) -> None:
    with pytest.raises(UserError, match="token id 999999"):
        run(llm, [*requests(2), Arrival([999999], 2, 0.0)], model_cost(llm))
    assert llm.unfinished == 0
    llm.scheduler.check()


def test_what_a_model_takes(llm: LLM) -> None:
    """By hand, from the configuration: 6 layers, 256 wide, 4 heads and 2 key/value heads of 64, 768 inside."""
    cost = model_cost(llm)
    layer = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 768
    assert cost.body == 2 * 6 * layer
    assert cost.head == 2 * 256 * 4096
    assert cost.pair == 4 * 6 * 256
    assert cost.weights == 4 * (6 * layer + 256 * 4096)
    assert cost.cached == 6 * 2 * 128 * 4
    assert cost.flops(3, 1, 10) == 3 * cost.body + cost.head + 10 * cost.pair
    assert cost.bytes(7) == cost.weights + 7 * cost.cached


def test_packed_weights_count_as_they_lie(tmp_path: Path) -> None:
    import quantkit

    quantkit.quantize(str(MODEL), {"scheme": "W4A16"}, tmp_path / "out", progress=False)
    dense, packed = (model_cost(LLM(path, "float32")) for path in (MODEL, tmp_path / "out"))
    assert (packed.body, packed.head) == (dense.body, dense.head)
    head = 4 * 256 * 4096
    assert (packed.weights - head) / (dense.weights - head) == pytest.approx(4.125 / 32, rel=0.1)


def test_the_peak_is_a_number() -> None:
    peak = measure_peak(torch.float32, torch.device("cpu"), repeat=1)
    assert peak.dtype == "float32"
    assert peak.flops > 1e6 < peak.copy_bytes
