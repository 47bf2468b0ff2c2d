"""The embedding table and the head of a GGUF: both are quantized too, by rounding, before the blocks.

So the blocks are calibrated on the states that the quantized table makes. What the head reads is known early enough
from a pass of a little of the text through the original model.

Shapes: V = vocabulary, H = hidden size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.algorithms.rotation import apply_columns
from quantkit.algorithms.rtn import relative_error, round_to_type
from quantkit.errors import RunError
from quantkit.formats.gguf.block_bytes import pack
from quantkit.ggml_types import QUANTIZED
from quantkit.model.model_ends import Head, head_inputs, head_tensor
from quantkit.model.streamed_model import StreamedModel, check_finite, release
from quantkit.quantization.calibration.hidden_states import HiddenStates
from quantkit.quantization.gguf_layout import TABLES
from quantkit.quantization.gguf_output import GgufOutput
from quantkit.quantization.run_context import RunContext
from quantkit.report.block_records import LinearRecord

HEAD_TOKENS = 8192  # of calibration text that show what the head reads
CHUNK = 16 << 20  # elements of a table that are quantized at a time


def table_names(output: GgufOutput) -> list[str]:
    """The checkpoint tensors that become the embedding and the head."""
    return [name for name, place in output.plan.places.items() if place.tensor in TABLES]


def write_tables(run: RunContext, ids_ST: Tensor | None) -> list[LinearRecord]:
    """Write the embedding and the head as their types are; returns the records of those that are quantized.

    ids_ST  calibration tokens (int64), for what the head reads; None: its columns count alike
    What the run's importance matrix has an entry for is weighed with that instead.
    """
    assert isinstance(run.writer, GgufOutput)
    head, records = head_name(run), []
    tables = [name for name in table_names(run.writer) if run.writer.plan.type_of(name) in QUANTIZED]
    given = {name: run.importance.get(name.removesuffix(".weight")) for name in tables}
    importance = {name: torch.from_numpy(e_H) for name, e_H in given.items() if e_H is not None}
    if head in tables and head not in importance and ids_ST is not None:
        e_H = _head_importance(run, ids_ST)
        importance |= {} if e_H is None else {head: e_H}
    for name in tables:
        records.append(_write_table(run, run.writer, name, importance.get(name)))
    return records


def head_name(run: RunContext) -> str | None:
    """The checkpoint tensor that the written head is made of, by its name in the output."""
    return head_tensor(run.streamed) if run.rotation is None else run.rotation.head_name


def quantized_ends(run: RunContext) -> tuple[StreamedModel, Head | None]:
    """The streamed model that reads the written embedding, and the written head (None: the checkpoint's own)."""
    if not isinstance(run.writer, GgufOutput):
        return run.streamed, None
    output = run.writer
    names = table_names(output)
    streamed = run.streamed.with_tables({name: lambda index, name=name: output.rows(name, index) for name in names})
    if (head := head_name(run)) not in names:
        return streamed, None
    return streamed, Head(lambda index: output.rows(head, index), lambda x: _read_by_head(run, x))


def _read_by_head(run: RunContext, x: Tensor) -> Tensor:
    """What the written head reads [..., H], from what the checkpoint's reads."""
    rotation = run.rotation
    return x if rotation is None else apply_columns(x / rotation.final_H.to(x), rotation.rotation)


def _head_importance(run: RunContext, ids_ST: Tensor) -> Tensor | None:
    """E[x^2] of what the head reads in the original model, float32 [H]; None where the head is not a linear."""
    streamed, samples = run.streamed, max(1, HEAD_TOKENS // ids_ST.shape[1])
    states = HiddenStates(streamed, ids_ST[:samples], run.folder)
    for index in range(len(streamed.blocks)):
        states.advance(streamed.fill(index), index)
        release(streamed.blocks[index])
    hidden_STH = states.hidden_STH if run.rotation is None else run.rotation.restore(states.hidden_STH)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample_TH in hidden_STH:
        x = head_inputs(streamed, sample_TH[None])
        if x is None:
            return None
        x = _read_by_head(run, x).double().flatten(0, -2)
        total, count = total + x.square().sum(0).cpu(), count + len(x)
    return (total / count).float()


def _write_table(run: RunContext, output: GgufOutput, name: str, importance_H: Tensor | None) -> LinearRecord:
    kind = output.plan.type_of(name)
    lost = energy = 0.0
    for start, rows in _rows(run, name):
        try:
            q = round_to_type(rows, kind, importance_H)
        except RunError as error:
            raise RunError(f"{name}: {error}") from error
        output.write_rows(name, start, pack(q))
        size = float(rows.double().square().sum())
        lost, energy = lost + size * relative_error(rows, q, importance_H), energy + size
    shape = output.plan.shapes[output.plan.places[name].tensor]
    module = name.removesuffix(".weight")
    return LinearRecord(module, kind, (shape[0], shape[1]), "rtn", lost / energy if energy else 0.0, None, None)


def _rows(run: RunContext, name: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as float32) of a table as it is to be written, a part at a time."""
    if run.rotation is not None and name in run.rotation.sources:
        for start, rows in run.rotation.chunks(name):
            yield start, rows.float()
        return
    checkpoint = run.streamed.checkpoint
    count, H = checkpoint.info(name).shape
    step = max(1, CHUNK // H)
    for start in range(0, count, step):
        rows = checkpoint.rows(name, torch.arange(start, min(start + step, count)))
        check_finite(rows, name)
        yield start, rows.float()
