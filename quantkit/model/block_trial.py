"""A trial run of blocks: each distinct kind is filled once, looked at and emptied again."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn

from quantkit.errors import RunError, UserError
from quantkit.model.block_arguments import Traffic, traffic
from quantkit.model.streamed_model import BlockCall, StreamedModel, first_line, release

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
    known: dict[Hashable, T] = {}
    found, handed = [], list[tuple[int, Traffic]]()
    for index, block in enumerate(streamed.blocks):
        key = structure_key(block)
        if key not in known:
            streamed.fill(index)
            try:
                call = calls[index]
                handed.append((index, traffic(block, (hidden, *call.args), call.kwargs)))
                _refuse_handovers(streamed, handed)
                known[key] = look(index, block, hidden, calls[index])
            except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UserError(
                    f"{streamed.prefix(index)[:-1]} ({type(block).__name__}): this block cannot be run on its own: "
                    f"{type(error).__name__}: {first_line(error)}; this architecture is not supported yet"
                ) from error
            finally:
                release(block)
        found.append(known[key])
    return found


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
