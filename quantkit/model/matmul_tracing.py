"""The matrix products of one decoder block, seen as they happen: which weight meets which input.

A torch-function mode looks at every linear, matmul, mm, bmm and addmm call and asks whether its right operand lies
where one of the block's parameters lies. So nn.Linear, Conv1D, hand-written `x @ w.T` and a slice of a fused 3-D expert
parameter are all the same thing here, and no class is named.

Shapes: M = tokens, N = out features, K = in features, E = experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import Cache

# function -> (position of the input, position of the weight, the weight operand is [K, N])
PRODUCTS: dict[Callable, tuple[int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, False),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), (0, 1, True)),
    **dict.fromkeys((torch.bmm, Tensor.bmm), (0, 1, True)),
    **dict.fromkeys((torch.addmm, Tensor.addmm), (1, 2, True)),
}


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One weight matrix of a block. Paths are relative to the block.

    name        module path ("self_attn.q_proj"); the parameter path with the expert's index where a parameter holds all
                experts ("mlp.experts.gate_up_proj.3")
    param       parameter path; index: expert index in a 3-D parameter, else None
    transposed  stored [K, N] (Conv1D; experts kept [E, in, out])
    bias        parameter path of a bias [N] that belongs to the same module, if there is one
    """

    name: str
    param: str
    index: int | None
    transposed: bool
    class_name: str
    bias: str | None = None

    def view(self, block: nn.Module) -> Tensor:
        """The live data as [N, K]: writing to it changes the block."""
        data = block.get_parameter(self.param).data
        data = data if self.index is None else data[self.index]
        return data.t() if self.transposed else data


@dataclass(frozen=True, slots=True)
class WeightKey:
    """Which parameter, and which expert of it, is the right operand of a product; transposed: stored [K, N]."""

    param: str
    index: int | None
    transposed: bool


OnProduct = Callable[[WeightKey, Tensor, Callable[[Tensor], Tensor]], Tensor]


class TraceMatmuls(TorchFunctionMode):
    """Calls `on_product(weight, x, run)` for each product with a parameter of `block`; what it returns is the result.

    x is [..., K] as the model passes it, run(x) computes the product [..., N], bias included where one call does both.
    Parameters must stay where they are meanwhile.
    """

    def __init__(self, block: nn.Module, on_product: OnProduct) -> None:
        super().__init__()
        self.on_product = on_product
        self.params = dict(block.named_parameters())
        self.at: dict[int, tuple[str, int | None]] = {}
        for name, param in self.params.items():
            if param.dim() == 3:
                step = param.stride(0) * param.element_size()
                self.at.update({param.data_ptr() + e * step: (name, e) for e in range(len(param))})
            elif param.dim() == 2:
                self.at[param.data_ptr()] = (name, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        layout = PRODUCTS.get(func)
        operand = None
        if layout is not None:
            # F.linear is at times called with weight=, bias= by name
            operand = args[layout[1]] if len(args) > layout[1] else kwargs.get("weight")
        found = self.find(operand, layout[2]) if layout and isinstance(operand, Tensor) else None
        if layout is None or found is None:
            return func(*args, **kwargs)
        if isinstance(found, list):
            return self.batched(found, args[layout[0]], args[layout[1]])
        position = layout[0]

        def run(x: Tensor) -> Tensor:
            return func(*args[:position], x, *args[position + 1 :], **kwargs)

        return self.on_product(found, args[position], run)

    def batched(self, weights: list[WeightKey], x_EMK: Tensor, w_EKN: Tensor) -> Tensor:
        """A bmm over all experts, as one product per expert."""
        products = zip(weights, x_EMK, w_EKN, strict=True)
        return torch.stack([self.on_product(weight, x_MK, lambda x, w=w: x @ w) for weight, x_MK, w in products])

    def find(self, operand: Tensor, by_columns: bool) -> WeightKey | list[WeightKey] | None:
        """The parameter this operand is a whole matrix of; for a whole 3-D parameter a list, one per expert."""
        where = self.at.get(operand.data_ptr())
        if where is None:
            return None
        name, index = where
        param = self.params[name]
        if operand.dim() == 3 == param.dim() and index == 0:
            flipped = operand.stride() != param.stride()
            return [WeightKey(name, e, by_columns != flipped) for e in range(len(param))]
        shape, stride = param.shape[-2:], param.stride()[-2:]
        if operand.dim() != 2:
            return None
        if operand.shape == shape and operand.stride() == stride:
            return WeightKey(name, index, by_columns)
        if operand.shape == shape[::-1] and operand.stride() == stride[::-1]:
            return WeightKey(name, index, not by_columns)
        return None


class Float64(TorchDispatchMode):
    """Everything computed inside is float64, also what asks for float32 by name; weights are widened one at a time.

    So a proof in float64 needs neither a float64 copy of the block nor models free of `.to(torch.float32)`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.is_view:  # a view must stay a view: it is widened where it is used
            return func(*args, **(kwargs or {}))
        wide_args, wide_kwargs = tree_map(widen, args), {key: tree_map(widen, v) for key, v in (kwargs or {}).items()}
        return tree_map(widen, func(*wide_args, **wide_kwargs))


def widen(value: Any) -> Any:
    """float64 in place of any narrower floating dtype or tensor; all else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.detach().to(torch.float64)
    return value


@contextmanager
def evaluation(block: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the block's mode is put back after it."""
    training = block.training
    block.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        block.train(training)


def without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same arguments with key-value caches dropped: a block is run many times on the same tokens."""
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kept = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    return args, kept | ({"use_cache": False} if "use_cache" in kwargs else {})
