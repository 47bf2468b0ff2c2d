"""Which parameters share one tensor, decided as transformers does when it loads the same checkpoint.

The configuration names pairs of tied parameters. A pair is tied where the checkpoint has only one of its two tensors,
or both with equal values; two tensors that differ stay two parameters, whatever the configuration says.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.model.weight_sources import TensorSlice

COMPARED_BYTES = 64 << 20  # of each of two tensors that are compared, at a time
Sources = dict[str, list[TensorSlice]]


def settle_ties(model: PreTrainedModel, sources: Sources, equal: Callable[[str, str], bool]) -> list[str]:
    """Untie what differs, and give each tied parameter without a tensor the source of its twin; remarks on both.

    model is on the meta device and ties what its configuration names; `sources` is completed in place; equal compares
    two checkpoint tensors. A tie whose own tensor is absent is the usual case and goes without a remark.
    """
    remarks = []
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, source in ties.items():
        if target in sources and source in sources:
            one, other = _whole(sources, target), _whole(sources, source)
            if one == other or equal(one, other):
                continue
            _untie(model, target)
            model.all_tied_weights_keys.pop(target)
            remarks.append(f"{target} and {source} are not tied: both are stored and differ, whatever config.json says")
        elif source in sources:
            sources[target] = sources[source]
        elif target in sources:
            sources[source] = sources[target]
            remarks.append(f"{source} is tied to {target}: only {target} is stored")
        elif twin := next((other for other, of in ties.items() if of == source and other in sources), None):
            sources[target] = sources[twin]
    return remarks


def equal_tensors(checkpoint: Checkpoint, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two matrices of a checkpoint have equal values as `dtype`; a part of each is in memory at a time."""
    info = checkpoint.info(one)
    if info.shape != checkpoint.info(other).shape:
        return False
    count = info.shape[0]
    step = max(1, COMPARED_BYTES * count // max(1, info.nbytes))
    parts = (torch.arange(start, min(start + step, count)) for start in range(0, count, step))
    return all(
        torch.equal(checkpoint.rows(one, rows).to(dtype), checkpoint.rows(other, rows).to(dtype)) for rows in parts
    )


def _whole(sources: Sources, name: str) -> str:
    """The checkpoint tensor that a parameter is, unchanged."""
    pieces = sources[name]
    if pieces != [TensorSlice(pieces[0].name)]:
        raise UserError(
            f"{name}: tied, yet stored beside its twin and made of parts of checkpoint tensors: cannot compare the two"
        )
    return pieces[0].name


def _untie(model: nn.Module, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    own = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)
    setattr(model.get_submodule(owner), leaf, own)
