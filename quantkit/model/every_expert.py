"""Every token through every expert, for what calibration sees of them; what the layer computes stays as it is.

A module of experts is handed the states, which experts each token goes to, and with what weights. Before it runs it
runs once more, on all experts for each token.

Shapes: M = tokens, E = experts, H = hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import UserError
from quantkit.model.block_arguments import named


@contextmanager
def every_token(block: nn.Module, params: Iterable[str]) -> Iterator[None]:
    """Inside, the modules that hold these parameters, a matrix of each expert, first run on all experts per token."""
    owners = {param.rpartition(".")[0]: len(block.get_parameter(param)) for param in params}

    def hook(experts: int) -> Any:
        def run_all(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            everywhere = sent_everywhere(module, args, kwargs, experts)
            with torch.no_grad():
                type(module).forward(
                    module,
                    *(everywhere[i] for i in range(len(args))),
                    **{key: value for key, value in everywhere.items() if isinstance(key, str)},
                )

        return run_all

    handles = [
        block.get_submodule(path).register_forward_pre_hook(hook(experts), with_kwargs=True)
        for path, experts in owners.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sent_everywhere(module: nn.Module, args: tuple, kwargs: dict[str, Any], experts: int) -> dict[int | str, Any]:
    """The module's arguments by position or keyword, with each token sent to all experts at weight 0.

    UserError where there is no single table of chosen experts [M, k] among them, and one of weights like it.
    """
    given = dict(named(args, kwargs))
    chosen = [key for key, value in given.items() if _is_table(value) and not value.is_floating_point()]
    weights = [
        key
        for key, value in given.items()
        if _is_table(value) and value.is_floating_point() and chosen and value.shape == given[chosen[0]].shape
    ]
    if len(chosen) != 1 or len(weights) != 1:
        raise UserError(
            f"experts.calibrate: all cannot be done with {type(module).__name__}, which is not handed the experts of "
            "each token\nhint: set experts.calibrate to routed"
        )
    M = given[chosen[0]].shape[0]
    table, weight = given[chosen[0]], given[weights[0]]
    return given | {
        chosen[0]: torch.arange(experts, device=table.device, dtype=table.dtype).expand(M, experts),
        weights[0]: weight.new_zeros(M, experts),
    }


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2
