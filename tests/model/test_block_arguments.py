"""What blocks write into: seen whatever it is, refused where other blocks read it, and never left from run to run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.model.block_arguments import guard, traffic


class Block(nn.Module):
    """Does to its arguments what it was made to do."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.change(hidden, *args, **kwargs)
        return hidden


class Holder:
    def __init__(self) -> None:
        self.value = torch.zeros(2)


CHANGES: dict[str, tuple[Any, Any]] = {
    "a tensor": (lambda: torch.zeros(3), lambda x: x.add_(1)),
    "a view of a tensor": (lambda: torch.zeros(3, 3), lambda x: x[0].fill_(1)),
    "a dict": (dict, lambda x: x.update(k=1)),
    "a dict's entry": (lambda: {"k": torch.zeros(2)}, lambda x: x.update(k=torch.ones(2))),
    "a tensor in a dict": (lambda: {"k": torch.zeros(2)}, lambda x: x["k"].add_(1)),
    "a list": (list, lambda x: x.append(1)),
    "a set": (set, lambda x: x.add(1)),
    "an attribute": (Holder, lambda x: setattr(x, "value", None)),
    "an attribute's tensor": (Holder, lambda x: x.value.add_(1)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("place", ["position", "keyword"])
def test_every_write_is_seen(name: str, place: str) -> None:
    make, change = CHANGES[name]
    value = make()
    hidden, still = torch.zeros(1, 2), torch.zeros(2)
    if place == "position":
        block = Block(lambda hidden, still, x: change(x))
        assert [key for key, _ in traffic(block, (hidden, still, value), {}).written] == ["positional argument 2"]
    else:
        block = Block(lambda hidden, x, still: change(x))
        assert [key for key, _ in traffic(block, (hidden,), {"x": value, "still": still}).written] == ["x"]


def test_a_block_that_writes_nothing() -> None:
    block = Block(lambda hidden, mask, kept: hidden.add_(mask))
    hidden = torch.zeros(2)
    assert traffic(block, (hidden, torch.ones(2)), {"kept": {"a": 1}}) == ([], [])
    assert torch.equal(hidden, torch.zeros(2))


def test_a_run_leaves_nothing_for_the_next() -> None:
    """Hidden states changed in place and containers that a block fills are its own in each run."""

    def change(hidden: Tensor, kept: dict[str, int]) -> None:
        assert not kept
        hidden.add_(1)
        kept["k"] = 1

    block, hidden, kept = Block(change), torch.zeros(2), dict[str, int]()
    guard(block)
    for _ in range(2):
        assert torch.equal(block(hidden, kept=kept), torch.ones(2))
        assert torch.equal(block(hidden, kept), torch.ones(2))
    assert torch.equal(hidden, torch.zeros(2))
    assert not kept


@pytest.mark.parametrize(
    ("use", "read"),
    [
        (lambda x: x["k"], True),
        (lambda x: x.get("k"), True),
        (lambda x: list(x.values()), True),
        (lambda x: x["absent"], True),
        (lambda x: x.update(k=1), False),
        (lambda x: None, False),
    ],
)
def test_a_dict_knows_whether_it_was_read(use: Any, read: bool) -> None:
    """A later block that finds nothing there has read it all the same."""
    kept = {"k": torch.zeros(1)}
    seen = traffic(Block(lambda hidden, kept: use(kept)), (torch.zeros(1),), {"kept": kept})
    assert [value is kept for _, value in seen.read] == [True] * read
