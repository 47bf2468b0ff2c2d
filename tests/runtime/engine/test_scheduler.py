"""The scheduler and its blocks, without a model: random traces, and the rules one by one."""

import random

import pytest

from quantkit.runtime.engine.blocks import BlockManager
from quantkit.runtime.engine.request import Request, SamplingParams
from quantkit.runtime.engine.scheduler import PATIENCE, Scheduler


def request(name: str, prompt: list[int], new: int = 4, priority: int = 0) -> Request:
    return Request(name, list(prompt), len(prompt), len(prompt) + new, SamplingParams(), priority=priority)


def run(scheduler: Scheduler, choose: random.Random | None = None) -> list[Request]:
    """One step as an engine does it: the requests that ended."""
    plan = scheduler.schedule()
    assert plan or not (scheduler.running or scheduler.waiting), "a step did nothing"
    assert sum(item.count for item in plan) <= scheduler.budget
    assert len({id(item.request) for item in plan}) == len(plan)
    ended = []
    for item in plan:
        assert item.request in scheduler.running
        assert item.count > item.drafts >= 0
        assert item.start == item.request.computed
        assert len(item.request.blocks) * scheduler.blocks.block_size >= item.start + item.count
    for item in plan:
        accepted = choose.randint(0, item.drafts) if choose else item.drafts
        item.request.computed += item.count - item.drafts + accepted
        if item.ends:
            new = [choose.randrange(3) if choose else 7 for _ in range(accepted + 1)]
            item.request.tokens += new
            assert item.request.computed == len(item.request.tokens) - 1
            if len(item.request.tokens) >= item.request.limit or (choose and choose.random() < 0.05):
                scheduler.finish(item.request)
                ended.append(item.request)
    scheduler.check()
    return ended


def trace(seed: int) -> None:
    """One random life of a scheduler: everything added ends or is cancelled, and every block is free again."""
    choose = random.Random(seed)
    size, blocks = choose.choice([1, 2, 4]), choose.randint(4, 24)
    manager = BlockManager(blocks, size, prefix_caching=choose.random() < 0.7, watermark=choose.randint(0, 2))
    scheduler = Scheduler(manager, choose.randint(1, 6), choose.randint(1, 20))
    todo = choose.randint(1, 10)
    added: list[Request] = []
    gone: list[Request] = []
    for _ in range(3000):
        while len(added) < todo and choose.random() < 0.5:
            prompt = [choose.randrange(2) for _ in range(choose.randint(1, blocks * size // 2))]
            new = request(str(len(added)), prompt, choose.randint(1, blocks * size // 2), choose.choice([0, 0, -1, 3]))
            assert scheduler.most_blocks(new) <= blocks
            scheduler.add(new)
            added.append(new)
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and choose.random() < 0.02:
            gone.append(choose.choice(alive))
            scheduler.finish(gone[-1])
        for active in scheduler.running:
            room = active.limit - len(active.tokens) - 1
            active.drafts_wanted = min(choose.randint(0, 3), max(room, 0)) if choose.random() < 0.3 else 0
        gone += run(scheduler, choose)
        if len(gone) == todo:
            break
    assert sorted(r.id for r in gone) == sorted(r.id for r in added)
    assert len(gone) == todo, f"seed {seed}: {todo - len(gone)} requests never ended"
    assert manager.free == blocks


@pytest.mark.parametrize("part", range(4))
def test_random_traces(part: int) -> None:
    for seed in range(part * 2500, (part + 1) * 2500):
        trace(seed)


def test_running_requests_come_first_and_the_budget_is_shared() -> None:
    scheduler = Scheduler(BlockManager(64, 4), 8, 6)
    first, second = request("a", range(5)), request("b", range(10, 20))
    scheduler.add(first)
    run(scheduler)
    scheduler.add(second)
    assert [(p.request.id, p.count) for p in scheduler.schedule()] == [("a", 1), ("b", 5)]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(BlockManager(6, 2, prefix_caching=False, watermark=0), 8, 64)
    requests = [request(name, range(4), 8) for name in "abc"]
    for each in requests:
        scheduler.add(each)
    run(scheduler)
    assert [r.id for r in scheduler.running] == ["a", "b", "c"]
    run(scheduler)
    assert [r.id for r in scheduler.running] == ["a", "b"]
    assert [r.id for r in scheduler.waiting] == ["c"]
    assert scheduler.preemptions == 1
    scheduler.add(request("d", range(1), 1))
    assert [r.id for r in scheduler.waiting] == ["c", "d"]


def test_priority_orders_the_queue_but_nobody_waits_for_ever() -> None:
    scheduler = Scheduler(BlockManager(64, 4), 1, 64)
    for name, priority in (("plain", 0), ("late", 2), ("soon", -1)):
        scheduler.add(request(name, [1, 2], 1, priority))
    assert [r.id for r in scheduler.waiting] == ["soon", "plain", "late"]
    scheduler.steps = 2 * PATIENCE + 1
    scheduler.add(request("newer", [1, 2], 1))
    assert [r.id for r in scheduler.waiting] == ["soon", "plain", "late", "newer"]


def test_prefixes_are_shared() -> None:
    manager = BlockManager(8, 2, watermark=0)
    scheduler = Scheduler(manager, 4, 64)
    scheduler.add(request("a", [1, 2, 3, 4, 5], 2))
    run(scheduler)
    scheduler.add(request("b", [1, 2, 3, 4, 9], 2))
    plan = scheduler.schedule()
    a, b = scheduler.running
    assert (plan[1].start, b.blocks[:2]) == (4, a.blocks[:2])
    assert [manager.references[block] for block in b.blocks] == [2, 2, 1]
    scheduler.check()


def test_known_blocks_are_taken_last_and_the_ends_of_sequences_before_their_beginnings() -> None:
    manager = BlockManager(8, 2, watermark=0)
    scheduler = Scheduler(manager, 4, 64)

    def pass_through(tokens: list[int]) -> list[int]:
        scheduler.add(one := request("x", tokens, 1))
        blocks = scheduler.schedule()[0].request.blocks[:]
        scheduler.finish(one)
        scheduler.check()
        return blocks

    known = pass_through([1, 2, 3, 4, 5])[:2]
    assert not set(pass_through([7, 8, 9])) & set(known)
    like_a, like_c = request("d", [1, 2, 3, 4, 6]), request("d", [7, 8, 1])
    assert manager.match(like_a) == known
    pass_through([11] * 10)  # the five blocks that are not known
    assert manager.match(like_a) == known
    pass_through([13] * 10)  # five more: of those unused for longest, all but the newest three
    assert manager.match(like_a) == []
    assert manager.match(like_c) == []
    assert len(manager.match(request("d", [13] * 11))) == 5
    pass_through([17] * 7)
    assert len(manager.match(request("d", [13] * 11))) == 4


def test_nobody_is_preempted_for_a_guess() -> None:
    scheduler = Scheduler(BlockManager(4, 2, watermark=0), 4, 64)
    for name in "ab":
        scheduler.add(request(name, [1, 2, 3] if name == "a" else [4, 5, 6], 4))
    run(scheduler)
    scheduler.running[0].drafts_wanted = 3
    plan = scheduler.schedule()
    assert [(item.request.id, item.count, item.drafts) for item in plan] == [("a", 1, 0), ("b", 1, 0)]
    assert scheduler.preemptions == 0


def test_a_digest_alone_is_not_believed() -> None:
    manager = BlockManager(8, 2)
    scheduler = Scheduler(manager, 4, 64)
    scheduler.add(request("a", [1, 2, 3], 2))
    run(scheduler)
    other = request("b", [5, 6, 7], 2)
    other.digests = [scheduler.running[0].digests[0]]  # as if both had the same
    assert manager.match(other) == []
    assert len(manager.match(request("c", [1, 2, 3], 2))) == 1


def test_a_whole_prompt_in_the_cache_leaves_a_token_to_compute() -> None:
    scheduler = Scheduler(BlockManager(8, 2), 4, 64)
    scheduler.add(request("a", [1, 2, 3, 4], 2))
    run(scheduler)
    assert len(scheduler.blocks.match(request("b", [1, 2, 3, 4], 2))) == 1


def test_check_finds_a_lost_block() -> None:
    scheduler = Scheduler(BlockManager(8, 2), 4, 64)
    scheduler.add(request("a", [1, 2, 3, 4], 2))
    run(scheduler)
    scheduler.running[0].blocks.pop()
    with pytest.raises(AssertionError):
        scheduler.check()
