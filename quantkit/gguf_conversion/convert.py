"""A model folder as a GGUF file: a quantized one with the very same codes and scales, or rounded again on request.

int4 and int8 in symmetric groups of 32, MXFP4 and NVFP4 have a GGUF type that holds their codes and scales exactly. A
folder with any other format is refused, unless a mix is named: its weights are then decoded and rounded onto the mix's
types. Dense tensors keep their dtype (vectors and routers become F32, which llama.cpp needs), unless types are named
for the embedding or the head. One tensor is in memory at a time, of a large dense one a part.

Shapes: N = out features, K = in features of a linear.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quantkit.algorithms.rtn import round_to_type
from quantkit.checkpoint.gguf_writer import GgufLayout, GgufWriter
from quantkit.checkpoint.journal import Journal, read_key
from quantkit.checkpoint.output_folder import file_hash, versions
from quantkit.errors import RunError, UserError
from quantkit.formats.gguf.block_bytes import float_bytes, pack
from quantkit.formats.gguf.carry_over import carried_bytes, carried_type
from quantkit.formats.gguf.metadata import model_metadata
from quantkit.formats.gguf.model_name import name_remarks
from quantkit.formats.gguf.remarks import file_remarks
from quantkit.formats.gguf.tensor_names import Place, architecture, extra_tensors, gguf_shapes, places, row_order
from quantkit.formats.gguf.tokenizer import tokenizer_metadata
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.gguf_conversion.choices import Choices, check_gguf_conversion
from quantkit.gguf_conversion.source import SourceFolder
from quantkit.gguf_conversion.types import EMBEDDING, choose_types, file_type, parts_of, remarks
from quantkit.paths import user_path
from quantkit.report.conversion_record import ConversionReport, RoundedScales

PART = 1 << 22  # elements of a tensor that are rounded, and of a dense one read, at a time


@dataclass(frozen=True, slots=True)
class _File:
    """The file to be written: what each tensor is made of, its type, its shape (rows first).

    requantized  whether all of it is rounded again
    """

    source: SourceFolder
    parts: Mapping[str, list[tuple[str, Place]]]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    requantized: bool


def convert_to_gguf(source: Path, output: Path, choices: Choices) -> ConversionReport:
    """Write the folder `source`, quantized or not, as the file `output`, or as NAME-00001-of-0000N.gguf where it is too
    large for one; returns what was done.

    UserError, with nothing left behind, where the folder is foreign or damaged, where GGUF cannot hold what is there
    exactly and nothing may be rounded, or where the file exists.
    """
    source, output = user_path(source), user_path(output)
    choices = choices.checked()
    folder = SourceFolder.open(check_gguf_conversion(source, output))
    choices = replace(choices, requantize=choices.mix_for(folder.schemes.values()))
    config = folder.config
    kind = architecture(config)
    parts = parts_of(places(config, folder.shapes))
    shapes = gguf_shapes(config, folder.shapes)
    vocabulary = shapes[EMBEDDING][0]
    name = source.resolve().name
    metadata = dict(model_metadata(config, name=name, vocab_size=vocabulary))
    types = choose_types(folder, parts, shapes, metadata, kind, choices)
    metadata["general.file_type"] = ("u32", file_type(types, shapes, choices))
    metadata |= folder.made_by()
    metadata |= tokenizer_metadata(folder.checkpoint.folder, vocabulary, pre=choices.pre, name=name)
    file = _File(folder, parts, shapes, types, choices.requantize is not None)
    partial = output.absolute().with_name(output.name + ".partial")
    Journal(partial, {"convert": str(source), "format": "gguf"}, restart="convert" in (read_key(partial) or {}))
    try:
        writer = GgufWriter(partial, metadata, _layouts(file), choices.shard_bytes, output.stem)
        for name, value in extra_tensors(config).items():
            writer.write_at(name, 0, torch.from_numpy(value).contiguous().view(torch.uint8))
        for tensor in parts:
            _write(file, tensor, writer)
        writer.finish()
        written = _publish(writer.paths, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ConversionReport(
        str(source),
        folder.format,
        "gguf",
        modules=len(folder.schemes),
        schemes=dict(Counter(types.values())),
        kv_cache=None,
        rounded=RoundedScales(0, 0, 0.0),
        versions=versions(),
        files={path.name: file_hash(path) for path in written},
        requantized=choices.requantize,
        notes=(
            *file_remarks(config, folder.shapes),
            *name_remarks(name, metadata["general.name"][1]),
            *remarks(folder, types, shapes, choices),
        ),
    )


def _layouts(file: _File) -> list[GgufLayout]:
    """Every tensor in the file's order; behind one of NVFP4 its global scales, one for each expert."""
    layouts = []
    for tensor, shape in file.shapes.items():
        layouts.append(GgufLayout(tensor, file.types[tensor], shape))
        if file.types[tensor] == "NVFP4":
            experts = (len(file.parts[tensor]),)
            scheme = file.source.scheme(file.parts[tensor][0][0])
            static = scheme is not None and scheme.activations is not None
            suffixes = ("scale", "input_scale") if static else ("scale",)
            stem = tensor.removesuffix("weight")
            layouts += [GgufLayout(f"{stem}{suffix}", "F32", experts) for suffix in suffixes]
    return layouts


def _write(file: _File, tensor: str, writer: GgufWriter) -> None:
    """Put the parts of a tensor at their places."""
    type_, columns = file.types[tensor], file.shapes[tensor][-1]
    row = GGML_TYPES[type_].row_bytes(columns)
    for name, place in file.parts[tensor]:
        N = prod(file.source.shapes[name][:-1])
        start = (place.expert or 0) * N * row
        with _naming(file, name):
            if not _carried(file, tensor, name, place, start, writer):
                for first, rows in _rows(file.source, name, place):
                    writer.write_at(tensor, start + first * row, _rounded(rows, type_))


def _rows(source: SourceFolder, name: str, place: Place) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as the file orders them) of a tensor of the checkpoint, a part at a time."""
    shape = source.shapes[name]
    if len(shape) == 1:
        values = source.vector(name)[_order(place, shape[0])]
        yield 0, values.float() + 1 if place.plus_one else values
        return
    order_N = _order(place, shape[0])
    packed_NK = None if source.scheme(name) is None else source.decoded(name)
    step = max(1, PART // shape[1])
    for start in range(0, shape[0], step):
        index = order_N[start : start + step]
        yield start, source.rows(name, index) if packed_NK is None else packed_NK[index]


def _carried(file: _File, tensor: str, name: str, place: Place, start: int, writer: GgufWriter) -> bool:
    """Put a packed weight at its place, codes and scales as they are, and NVFP4's global scales at theirs.

    False, with nothing written, where its type is not the one that holds it. UserError where a scale is not exact in
    it, unless the folder is rounded again.
    """
    scheme = file.source.scheme(name)
    if scheme is None or carried_type(scheme.weights) != file.types[tensor]:
        return False
    q = file.source.packed(name)
    try:
        bytes_NB = carried_bytes(q)
    except UserError:
        if file.requantized:
            return False
        raise
    writer.write_at(tensor, start, bytes_NB[_order(place, len(bytes_NB))])
    if q.global_scale is not None:
        stem, at = tensor.removesuffix("weight"), 4 * (place.expert or 0)
        writer.write_at(f"{stem}scale", at, torch.tensor([q.global_scale]).view(torch.uint8))
        if q.input is not None:
            writer.write_at(f"{stem}input_scale", at, q.input.scale.float().reshape(1).view(torch.uint8))
    return True


def _rounded(w_NK: Tensor, type_: str) -> Tensor:
    """The bytes [N, bytes of a row] of weights rounded to a type, every column of the same importance."""
    if type_ not in QUANTIZED:
        return float_bytes(w_NK, type_)
    return pack(round_to_type(w_NK, type_))


def _order(place: Place, N: int) -> Tensor:
    """Which row of the checkpoint's tensor each row of the file's is [N]: of q and k, pairs of a head side by side."""
    return torch.arange(N) if place.heads is None else torch.from_numpy(row_order(N, place.heads))


@contextmanager
def _naming(file: _File, name: str) -> Iterator[None]:
    """An error raised inside names the folder and the tensor, and says what to do."""
    try:
        yield
    except (UserError, RunError) as error:
        text = str(error) if name in str(error) else f"{file.source.checkpoint.folder}: {name}: {error}"
        if isinstance(error, UserError) and "hint:" not in text and "exact" in text:
            text += "\nhint: pass --requantize q4_k_m, or another mix, to decode the weights and round them again"
        raise type(error)(text) from error


def _publish(paths: list[Path], output: Path) -> list[Path]:
    """Rename the finished files to their names beside each other; the first shard, which engines open, last."""
    targets = [output.absolute().parent / path.name for path in paths]
    if taken := next((path for path in targets if path.exists()), None):
        raise RunError(f"{taken} appeared while the file was written, and is not overwritten")
    for path, target in reversed(list(zip(paths, targets, strict=True))):
        path.rename(target)
    return targets
