"""A trial run of blocks: each distinct kind is filled once, looked at and emptied again."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantkit.errors import RunError, UserError
from quantkit.model.block_arguments import Traffic, handed_on, traffic
from quantkit.model.streamed_model import BlockCall, Returned, StreamedModel, first_line, release

T = TypeVar("T")
TRIAL_TOKENS = 17  # a prime: no dimension of the model is taken for that of the tokens


def structure_key(block: nn.Module) -> Hashable:
    """Equal for blocks that run alike, so that one trace and one proof hold for all: classes, shapes and flags."""
    modules = tuple(
        (
            path,
            type(module).__qualname__,
            tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, str)) and k != "training")),
        )
        for path, module in block.named_modules()
    )
    return modules, tuple((name, tuple(param.shape)) for name, param in block.named_parameters())


def trial_ids(streamed: StreamedModel) -> Tensor:
    """A few token ids [1, TRIAL_TOKENS] that every model knows."""
    return (torch.arange(TRIAL_TOKENS) % streamed.model.config.get_text_config().vocab_size).reshape(1, -1)


def once_per_structure(streamed: StreamedModel, look: Callable[[int, nn.Module, Tensor, BlockCall], T]) -> list[T]:
    """look(index, block, hidden states, how the block is called) for each block; blocks of one structure share it."""
    hidden, calls = streamed.first_call(trial_ids(streamed))
    containers = handed_on(calls)
    calls = [call.with_arguments(containers) for call in calls]
    writers = set[Hashable]()  # kinds of blocks that put something into a container for blocks behind them
    wanted = {value for call in calls for value in call.handed()}
    returned: dict[Returned, Any] = {}
    known: dict[Hashable, T] = {}
    found, handed = [], list[tuple[int, Traffic]]()
    for index, block in enumerate(streamed.blocks):
        call = calls[index].with_returned(returned)
        hands_on = {value.position: value for value in wanted if value.block == index}
        key = (structure_key(block), call.skipped)
        if key not in known:
            streamed.fill(index)
            try:
                seen = Traffic([], []) if call.skipped else traffic(block, (hidden, *call.args), call.kwargs)
                if any(_is_one_of(value, containers) for _, value in seen.written):
                    writers.add(key)
                handed.append((index, _without(seen, containers)))
                _refuse_handovers(streamed, handed)
                known[key] = look(index, block, hidden, call)
                _hand_on(block, hidden, call, containers if key in writers else {}, hands_on, returned)
            except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UserError(
                    f"{streamed.prefix(index)[:-1]} ({type(block).__name__}): this block cannot be run on its own: "
                    f"{type(error).__name__}: {first_line(error)}; this architecture is not supported yet"
                ) from error
            finally:
                release(block)
        elif key in writers or hands_on:
            streamed.fill(index)
            _hand_on(block, hidden, call, containers if key in writers else {}, hands_on, returned)
            release(block)
        found.append(known[key])
    return found


def _hand_on(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    containers: Mapping[int | str, Any],
    hands_on: Mapping[int, Returned],
    returned: dict[Returned, Any],
) -> None:
    """Run a filled block so that it writes into the containers, and note what it returns for blocks behind it.

    hands_on: by position in its output.
    """
    for container in containers.values():
        container.open = True
    if containers or hands_on:
        replace(call, on_output=partial(note_returned, hands_on, returned)).run(block, hidden)
    for container in containers.values():
        container.open = False


def note_returned(hands_on: Mapping[int, Returned], returned: dict[Returned, Any], output: tuple) -> None:
    """Keep what of a block's output is handed on."""
    returned |= {value: output[position] for position, value in hands_on.items()}


def _is_one_of(value: Any, containers: Mapping[int | str, Any]) -> bool:
    return any(value is container for container in containers.values())


def _without(seen: Traffic, containers: Mapping[int | str, Any]) -> Traffic:
    """What passes through other arguments than these."""
    return Traffic(*([entry for entry in entries if not _is_one_of(entry[1], containers)] for entries in seen))


def _refuse_handovers(streamed: StreamedModel, handed: list[tuple[int, Traffic]]) -> None:
    """UserError where a block writes into an argument that another one reads: only outputs are handed on."""
    for index, seen in handed:
        for name, value in seen.written:
            readers = [
                other for other, theirs in handed if any(value is read for _, read in theirs.read) and other != index
            ]
            if isinstance(value, Tensor) or readers:
                block = streamed.blocks[index]
                raise UserError(
                    f"{streamed.prefix(index)[:-1]} ({type(block).__name__}): it writes into its argument {name}"
                    + (f", which block {readers[0]} reads" if readers else "")
                    + "; blocks that hand each other more than hidden states are not supported yet"
                )
