"""The output head as one more linear: what a recipe's `head` asks for, behind the last block.

Shapes: V = vocabulary, H = hidden size.
"""

from torch import Tensor, nn

from quantkit.errors import RunError, UserError
from quantkit.grids.dequantize import dequantize
from quantkit.model.matmul_tracing import LinearSite
from quantkit.model.model_ends import Head, head_inputs, head_tensor
from quantkit.model.streamed_model import StreamedModel, check_finite
from quantkit.quantization.calibration.hidden_states import HiddenStates
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.quantization.run_context import RunContext
from quantkit.quantization.targets import HEAD, Candidate, LinearTarget
from quantkit.recipe.recipe import Recipe

FORMATS = ("compressed-tensors", "gptq", "gptq_v2")  # whose configuration has a place for it


def head_candidate(recipe: Recipe, streamed: StreamedModel) -> list[Candidate]:
    """The head, where the recipe asks for it; UserError where it has no tensor of its own, or no engine loads it."""
    if recipe.head is None:
        return []
    if recipe.output.format not in FORMATS:
        raise UserError(
            f"head: output.format {recipe.output.format} has no place for a quantized head\n"
            f"hint: set output.format to {FORMATS[0]} or {FORMATS[1]}, or remove head"
        )
    if any(transform.name == "rotation" for transform in recipe.transforms):
        raise UserError("head: a rotated model's head is not quantized yet\nhint: remove head, or the rotation")
    tensor, output = head_tensor(streamed), streamed.model.get_output_embeddings()
    kind = type(streamed.model).__name__
    if tensor is None or not isinstance(output, nn.Linear):
        raise UserError(f"head: that of {kind} is not a linear with a tensor of its own\nhint: remove head")
    tables = {
        piece.name
        for path, module in streamed.model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
        for piece in streamed.sources.get(f"{path}.weight", ())
    }
    if tensor in tables:
        raise UserError(
            f"head: {kind}'s head is tied to its embedding, {tensor} is both, and no engine loads such a table "
            "quantized for both\nhint: remove head, or store the head as a tensor of its own"
        )
    name, info = tensor.removesuffix(".weight"), streamed.checkpoint.info(tensor)
    V, H = info.shape
    site = LinearSite(name, "weight", None, False, type(output).__name__)
    return [Candidate(name, HEAD, site, slice(None), (V, H), info.dtype, None)]


def head_weight(run: RunContext, linear: LinearTarget) -> Tensor:
    """The head's weight [V, H] as it is computed with."""
    name = f"{linear.name}.weight"
    weight = run.streamed.checkpoint.read(name)
    check_finite(weight, name)
    return weight.to(run.streamed.device, run.streamed.dtype)


def head_statistic(run: RunContext, states: HiddenStates, *, hessian: bool, block: int | None) -> Statistic:
    """What the head reads, for the states that left the last block."""
    found: Statistic | None = None
    for part in states.slices:
        for sample_TH in states.hidden_STH[part]:
            x = head_inputs(run.streamed, sample_TH[None])
            if x is None:
                raise RunError("head: what it reads cannot be found behind the last block\nhint: remove head")
            x_MH = x.reshape(-1, x.shape[-1])
            found = found or Statistic.empty(x_MH, hessian=hessian, block=block)
            found.add(x_MH)
    assert found is not None
    found.finish()
    return found


def written_head(run: RunContext) -> Head | None:
    """The head as it was written; None where it stays as it is."""
    if linears := run.targets.of_block(HEAD):
        linear = linears[0]
        layout = run.format.layout(linear.shape, linear.scheme, linear.scale_dtype)
        tensors = {suffix: run.writer.read(f"{linear.name}.{suffix}") for suffix in layout}
        weight_VH = dequantize(run.format.unpack(tensors, linear.scheme))
        return Head(lambda index: weight_VH[index])
    return None
