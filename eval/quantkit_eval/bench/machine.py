"""What this machine reaches, measured, and what a step of a model takes of it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.speculation import DraftModel
from quantkit.runtime.quant_linear import QuantLinear

SIDE = 1024  # of the square matrices whose product is the peak
COPIED = 128 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Peak:
    """flops a second of a product of matrices in `dtype`; bytes a second read and written by a copy."""

    dtype: str
    flops: float
    copy_bytes: float


def measure_peak(dtype: torch.dtype, device: torch.device, repeat: int = 5) -> Peak:
    """The best of `repeat` tries, on as many threads as torch uses."""
    one = torch.randn(SIDE, SIDE, device=device).to(dtype)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: one @ one, device) for _ in range(repeat))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(repeat))
    return Peak(str(dtype).removeprefix("torch."), 2 * SIDE**3 / product, 2 * COPIED / copy)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Arithmetic and bytes of a step.

    body, head   flops of a token through the blocks; through the output head
    pair         flops of attention between one query and one cached token
    weights      bytes of weights that a step reads once; cached: bytes of a token in the cache
    """

    body: float
    head: float
    pair: float
    weights: int
    cached: float

    def flops(self, tokens: int, rows: int, pairs: float) -> float:
        """Of a step with so many tokens, rows of logits, and pairs of a query and what it attends to."""
        return tokens * self.body + rows * self.head + pairs * self.pair

    def bytes(self, cached: int) -> float:
        """Read by a step whose sequences have so many tokens in the cache together."""
        return self.weights + cached * self.cached


def model_cost(llm: LLM) -> ModelCost:
    """Of the engine's model and its draft model.

    Windows of attention are not considered, and of fused experts each token takes its own: these two make the figures
    upper bounds of bytes. Norms and activations are left out.
    """
    body = head = pair = 0.0
    weights = 0
    for runner in [llm.runner, *([llm.drafter.runner] if isinstance(llm.drafter, DraftModel) else [])]:
        each = _matrices(runner.model)
        body, head, weights = body + each[0], head + each[1], weights + each[2]
        config = runner.model.config.get_text_config()
        pair += sum(4 * config.num_attention_heads * shape.head_size for shape in runner.shapes.values())
    return ModelCost(body, head, pair, weights, llm.block_bytes / llm.scheduler.blocks.block_size)


def _matrices(model: nn.Module) -> tuple[float, float, int]:
    """(flops of a token in the blocks, in the head, bytes of weights) by the model's products of matrices."""
    flops = [0.0, 0.0]
    weights = 0
    output = model.get_output_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[operator]
    experts = next((getattr(config, name) for name in EXPERTS if getattr(config, name, None)), 1)
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, QuantLinear):
            shape = module.out_features, module.in_features
            layout = module.format.layout(shape, module.scheme, torch.float16)
            count, size = math.prod(shape), sum(d.itemsize * math.prod(dims) for d, dims in layout.values())
        else:
            own = [param for param in module.parameters(recurse=False) if param.dim() > 1]
            count = sum(param.numel() * (share if param.dim() == 3 else 1) for param in own)
            size = sum(param.nbytes for param in own)
        flops[module is output] += 2 * count
        weights += size
    return flops[0], flops[1], weights


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
