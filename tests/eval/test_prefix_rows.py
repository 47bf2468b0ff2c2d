"""Rows that hold several continuations: what shares a row, and that each list sees itself alone there."""

import random

import numpy as np
import pytest
import torch
from quantkit_eval.prefix_rows import Continuation, Row, batches, model_inputs, pack


def lists_of(row: Row) -> list[list[int]]:
    return [[row.ids[i] for i in path] for path in row.paths]


def test_choices_of_one_context_cost_it_once() -> None:
    context = [5, 6, 7, 8]
    requests = [Continuation([*context, *end], len(end)) for end in ([1, 2, 3], [1, 9], [4, 4, 4])]
    (row,) = pack(requests, longest=None)
    assert len(row.ids) == 4 + 2 + 0 + 2  # the last token of each is not read, and [1] is common to two
    for path, members in zip(row.paths, row.members, strict=True):
        for i in members:
            assert [row.ids[at] for at in path] == requests[i].inputs
            assert [row.depths[at] for at in path] == list(range(len(path)))
    assert row.branches


def test_one_token_choices_share_their_whole_row() -> None:
    (row,) = pack([Continuation([3, 4, 5, last], 1) for last in (7, 8, 9)], longest=None)
    assert row.ids == [3, 4, 5]
    assert sorted(row.members[0]) == [0, 1, 2]
    assert not row.branches


def test_a_token_sees_the_tokens_of_its_own_lists_alone() -> None:
    draw = random.Random(0)
    for _ in range(30):
        context = draw.choices(range(9), k=draw.randint(2, 6))
        ends = [draw.choices(range(3), k=draw.randint(1, 5)) for _ in range(draw.randint(1, 5))]
        for row in pack([Continuation(context + end, len(end)) for end in ends], longest=None):
            expected = np.zeros((len(row.ids),) * 2, dtype=bool)
            for path in row.paths:
                expected[np.ix_(path, path)] |= np.tri(len(path), dtype=bool)
            np.testing.assert_array_equal(row.sees(), expected)


def test_lists_that_share_little_or_are_too_long_lie_apart() -> None:
    one, other = Continuation([1, 2, 3, 4, 5, 6], 1), Continuation([1, 9, 3, 4, 5, 6], 1)
    assert len(pack([one, other], longest=None)) == 2
    choices = [Continuation([1, 2, 3, 4, end, end], 2) for end in (5, 6)]
    assert len(pack(choices, longest=5)) == 1
    assert len(pack(choices, longest=4)) == 2
    assert len(pack(choices, longest=0)) == 2
    many = [Continuation([1, 2, 3, *[end] * 700], 700) for end in range(4, 8)]
    assert all(len(row.ids) <= 1500 for row in pack(many, longest=None))


def test_batches_hold_rows_of_one_kind() -> None:
    requests = [Continuation([i, i, i, end, 0], 2) for i in range(5) for end in (6, 7)]
    rows = pack([*requests, *(Continuation([50 + i] * (3 + i), 1) for i in range(4))], longest=None)
    found = list(batches(rows, 3, None))
    assert sorted(len(batch) for batch in found) == [1, 2, 3, 3]
    assert all(len({row.branches for row in batch}) == 1 for batch in found)
    assert all(len(batch) * max(len(row.ids) for row in batch) <= 12 for batch in batches(rows, 9, 12))


def test_rows_without_branches_need_no_mask() -> None:
    plain = pack([Continuation([1, 2, 3], 1), Continuation([4, 5], 1)], longest=None)
    assert model_inputs(plain, torch.float32, torch.device("cpu")).keys() == {"input_ids"}
    tree = pack([Continuation([1, 2, 3, 9], 2), Continuation([1, 2, 4, 9], 2)], longest=None)
    inputs = model_inputs([*tree, *plain], torch.float32, torch.device("cpu"))
    assert inputs["attention_mask"].shape == (3, 1, 4, 4)
    assert inputs["attention_mask"][0, 0, 3].tolist() == [0, 0, pytest.approx(torch.finfo(torch.float32).min), 0]
    assert torch.isfinite(inputs["attention_mask"].softmax(-1)).all()
    assert inputs["position_ids"][0].tolist() == [0, 1, 2, 2]
