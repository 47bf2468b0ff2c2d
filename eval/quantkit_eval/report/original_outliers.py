"""The largest weights and input channels of the original's linears, as it is: before folds and rotations."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.outliers import input_peak, weight_peak
from quantkit.report.measurements import OriginalOutliers

WINDOWS = 8  # of a text: peaks of channels differ little from text to text


@torch.inference_mode()
def original_outliers(model: Any, names: Iterable[str], ids_WT: Tensor) -> list[OriginalOutliers]:
    """Peaks of the named linears of a model, inputs from the first windows of ids_WT int64 [W, T].

    Names that are no module of the model (experts that lie in one tensor) are left out.
    """
    modules = {name: module for name in names if (module := _linear(model, name)) is not None}
    sums_K: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_MK = arguments[0].reshape(-1, arguments[0].shape[-1])
            sums_K[name] = sums_K.get(name, 0) + x_MK.float().square().sum(0)  # type: ignore[operator]
            counts[name] = counts.get(name, 0) + len(x_MK)

        return add

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        for ids_T in ids_WT[:WINDOWS]:
            model(input_ids=ids_T[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [
        OriginalOutliers(
            name, weight_peak(module.weight), input_peak(sums_K[name] / counts[name]) if name in sums_K else None
        )
        for name, module in modules.items()
    ]


def _linear(model: nn.Module, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None
