"""Arguments that blocks write into: which, and copies of them, so that every run of a block is like its first.

A block is run many times on the same arguments. Its hidden states and the containers it is given (a dict of keys and
values that later blocks read, a list it appends to) are therefore copied for each run.
"""

import copy
from collections import UserDict
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

Containers = MutableMapping | MutableSequence | MutableSet


def guard(block: nn.Module) -> None:
    """From now on each call of the block gets copies of its hidden states (the first tensor) and of its containers."""

    def copies(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if "forward" in vars(module):
            return None  # replaced by a function that only records what it is given
        first = next((key for key, value in named(args, kwargs) if isinstance(value, Tensor)), None)

        def own(key: int | str, value: Any) -> Any:
            if key == first:
                return value.clone()
            return copy.copy(value) if isinstance(value, Containers) else value

        return tuple(own(i, v) for i, v in enumerate(args)), {key: own(key, v) for key, v in kwargs.items()}

    block.register_forward_pre_hook(copies, with_kwargs=True, prepend=True)


def handed(value: Any) -> Any:
    """The container through which blocks hand each other something, made of an empty one; None for all else.

    While its `open` is set, a block writes into it itself; otherwise, as with all containers, into a copy of it.
    """
    if not isinstance(value, dict | UserDict) or len(value):
        return None
    base: Any = type(value)

    class Handed(base):  # pyright: ignore[reportGeneralTypeIssues]
        open = False

        def __copy__(self) -> Any:
            if self.open:
                return self
            plain = base()
            plain.update(self)
            return plain

    return Handed()


def handed_on(calls: Sequence["Arguments"]) -> dict[int | str, Any]:
    """The empty container at each place (position or keyword) where every block that has one gets the same."""
    found: dict[int | str, dict[int, Any]] = {}
    for call in calls:
        for place, value in named(call.args, call.kwargs):
            if isinstance(value, dict | UserDict) and not len(value):
                found.setdefault(place, {})[id(value)] = value
    return {place: handed(next(iter(same.values()))) for place, same in found.items() if len(same) == 1}


class Arguments(Protocol):
    """How a block is called, behind its hidden states."""

    @property
    def args(self) -> tuple: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...


def named(args: tuple, kwargs: dict) -> Iterator[tuple[int | str, Any]]:
    """Arguments with their position or keyword."""
    yield from enumerate(args)
    yield from kwargs.items()


def watching(base: type) -> type:
    """A subclass of a mapping's class whose objects know, by `was_read`, whether they were read."""

    class Watching(base):
        was_read = False

        def __getitem__(self, key: Any) -> Any:
            self.was_read = True
            return super().__getitem__(key)

        def get(self, key: Any, default: Any = None) -> Any:
            self.was_read = True
            return super().get(key, default)

        def items(self) -> Any:
            self.was_read = True
            return super().items()

        def values(self) -> Any:
            self.was_read = True
            return super().values()

    return Watching


class Traffic(NamedTuple):
    """(name, value) of the arguments that a run of a block changes, and of the containers that it reads."""

    written: list[tuple[str, Any]]
    read: list[tuple[str, Any]]


def traffic(block: nn.Module, args: tuple, kwargs: dict) -> Traffic:
    """What a run of the block does to its arguments beside its hidden states (args[0]).

    Positions count from 1 behind the hidden states. The block runs on copies of its hidden states and containers. That
    a container is read is seen of a mapping; of all others it is assumed.
    """
    given = {key: _watched(value) for key, value in named(args[1:], kwargs)}
    before = {key: state_of(value) for key, value in given.items()}
    for value in given.values():
        if hasattr(value, "was_read"):
            value.was_read = False
    with suppress(LookupError), torch.no_grad():  # of what another block would have put there: a read all the same
        block.forward(
            args[0].clone(),
            *(given[i] for i in range(len(args) - 1)),
            **{key: value for key, value in given.items() if isinstance(key, str)},
        )
    names = {key: key if isinstance(key, str) else f"positional argument {key + 1}" for key in given}
    read = {key for key, value in given.items() if getattr(value, "was_read", isinstance(value, Containers))}
    original = dict(named(args[1:], kwargs))
    return Traffic(
        [(names[key], original[key]) for key, value in given.items() if state_of(value) != before[key]],
        [(names[key], original[key]) for key in given if key in read],
    )


def _watched(value: Any) -> Any:
    """A copy of a container, of a mapping one that knows whether it was read; all else as it is."""
    if type(value) is dict:
        return watching(dict)(value)
    if not isinstance(value, Containers):
        return value
    value = copy.copy(value)
    if isinstance(value, MutableMapping):
        with suppress(TypeError):  # a class whose objects cannot change it: taken for read
            value.__class__ = watching(type(value))
    return value


def state_of(value: Any) -> Any:
    """Something that differs after a write into the value: versions of tensors, contents of containers and objects."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, MutableMapping):
        return {key: (id(item), state_of(item)) for key, item in value.items()}
    if isinstance(value, list | tuple | MutableSequence):
        return [(id(item), state_of(item)) for item in value]
    if isinstance(value, MutableSet):
        return {id(item) for item in value}
    if isinstance(value, nn.Module | PretrainedConfig | Cache | type) or callable(value):
        return None
    if hasattr(value, "__dict__"):
        return {
            key: (id(item), item._version if isinstance(item, Tensor) else None) for key, item in vars(value).items()
        }
    return None
