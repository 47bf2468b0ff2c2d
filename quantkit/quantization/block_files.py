"""The tensors of the output: what is copied, what of a block stays unquantized, and a finished block read back."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.ggml_types import QUANTIZED
from quantkit.grids.dequantize import dequantize
from quantkit.model.streamed_model import check_finite
from quantkit.model.weight_sources import TensorSlice
from quantkit.quantization.gguf_output import GgufOutput
from quantkit.quantization.run_context import BlockContext, RunContext
from quantkit.quantization.targets import HEAD, LinearTarget
from quantkit.types import ActivationRange, QuantizedWeight

COPIED_BYTES = 64 << 20  # checked at a time


def copy_unquantized(run: RunContext) -> None:
    """Copy every tensor that no block's parameter comes from, bytes as they are; RunError where one has NaN or Inf.

    Rotated ones are written as the rotation makes them.
    """
    checkpoint, rotation = run.streamed.checkpoint, run.rotation
    done = {
        piece.name
        for index, block in enumerate(run.streamed.blocks)
        for name, _ in block.named_parameters()
        for piece in run.streamed.sources[run.streamed.prefix(index) + name]
    }
    done |= {f"{linear.name}.weight" for linear in run.targets.of_block(HEAD)}
    if isinstance(run.writer, GgufOutput):
        run.writer.write_extra()
        plan = run.writer.plan
        done |= {name for name in plan.places if plan.type_of(name) in QUANTIZED}  # by write_tables
    if rotation is not None:
        for name in set(rotation.sources) - done:
            for start, rows in rotation.chunks(name):
                run.writer.write_rows(name, start, rows)
        done |= set(rotation.sources)
    for name, info in checkpoint.tensors.items():
        if name in done:
            continue
        if len(info.shape) == 2:
            step = max(1, COPIED_BYTES // max(1, info.shape[1] * info.dtype.itemsize))
            for start in range(0, info.shape[0], step):
                check_finite(checkpoint.rows(name, torch.arange(start, min(start + step, info.shape[0]))), name)
        else:
            check_finite(checkpoint.read(name), name)
        run.writer.copy_from(checkpoint, name, name)


def write_quantized(run: RunContext, linear: LinearTarget, q: QuantizedWeight) -> None:
    """Write a linear's tensors as its format lays them out."""
    for suffix, tensor in run.format.pack(q, linear.scheme).items():
        run.writer.write(f"{linear.name}.{suffix}", tensor.cpu())


def write_rest(run: RunContext, context: BlockContext) -> None:
    """Write what of the block stays unquantized, with the values it has now."""
    for piece, value in _unquantized(run, context):
        if piece.part:  # one of several parameters in one tensor of the checkpoint
            whole = run.writer.read(piece.name)
            piece.of(whole).copy_(value)
            run.writer.write(piece.name, whole)
        else:
            dtype = run.streamed.checkpoint.tensors[piece.name].dtype
            run.writer.write(piece.name, (value.mT if piece.transposed else value).to(dtype))


def round_rest(run: RunContext, context: BlockContext) -> None:
    """Round transformed norms and biases to what the file will hold, so that calibration sees the same."""
    for piece, value in _unquantized(run, context):
        value.copy_(value.to(run.streamed.checkpoint.tensors[piece.name].dtype))


def fill_written(run: RunContext, context: BlockContext) -> dict[str, ActivationRange | None]:
    """Fill the block with what was written for it: dequantized weights and the rest.

    Returns the ranges of its linears' inputs by name.
    """
    ranges = {}
    for piece, value in _unquantized(run, context):
        value.copy_(piece.of(run.writer.read(piece.name)))
    for linear in context.linears:
        layout = run.format.layout(linear.shape, linear.scheme, linear.scale_dtype)
        tensors = {suffix: run.writer.read(f"{linear.name}.{suffix}") for suffix in layout}
        q = run.format.unpack(tensors, linear.scheme)
        linear.view(context.block).copy_(dequantize(q))
        ranges[linear.name] = q.input
    return ranges


def _unquantized(run: RunContext, context: BlockContext) -> Iterator[tuple[TensorSlice, Tensor]]:
    """Every slice of a checkpoint tensor of the block that stays unquantized, with its live values."""
    quantized = {f"{linear.name}.weight" for linear in context.linears}
    prefix = run.streamed.prefix(context.index)
    for name, param in context.block.named_parameters():
        for piece in run.streamed.sources[prefix + name]:
            if piece.name not in quantized:
                yield piece, param.data[piece.where] if piece.where else param.data
