"""Convert a quantized folder from one format to another: the same codes, scales and zero points, or no folder at all.

Each module is unpacked, packed again, unpacked once more and compared. What the target cannot hold exactly is refused,
and formats that can are named; `requantize` lets scales be rounded to the target's numbers, and nothing else. One
module is in memory at a time. A group whose weights are all zero has no scale to keep: it gets the target's least where
its own does not fit.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.early_checks import check_conversion
from quantkit.checkpoint.journal import Journal, read_key
from quantkit.checkpoint.output_folder import (
    REPORT,
    copy_side_files,
    file_hashes,
    side_files,
    versions,
    write_json,
)
from quantkit.checkpoint.quantization_config import without_quantization
from quantkit.checkpoint.writer import ShardWriter, TensorLayout
from quantkit.errors import UserError
from quantkit.formats import FORMATS, Format, holders
from quantkit.formats.common import natural
from quantkit.formats.quantized_folder import QuantizedFolder
from quantkit.paths import user_path
from quantkit.report.conversion_record import ConversionReport, RoundedScales
from quantkit.suggestions import unknown
from quantkit.types import QuantizedWeight, Scheme

SHARD_BYTES = 5_000_000_000


def convert(source: Path, output: Path, format_name: str, *, requantize: bool = False) -> ConversionReport:
    """Write the quantized folder `source` as `output` in another of FORMATS; returns the report that lies in it.

    UserError, with nothing left behind, where the folder is not quantized, foreign or damaged, where the target cannot
    hold what is there, or where `output` exists.
    """
    source, output = user_path(source), user_path(output)
    if format_name not in FORMATS or format_name == "gguf":  # a file, not a folder
        raise unknown("format", format_name, FORMATS)
    folder, target = QuantizedFolder.open(check_conversion(source, output)), FORMATS[format_name]
    side_files(folder.checkpoint.folder)
    _refuse_unknown(folder)
    units = _layouts(folder, target, format_name)
    settings = target.config(folder.schemes, folder.dense_linears(), folder.kv)
    if target.read_config(settings, list(folder.schemes)) != folder.schemes or target.read_kv(settings) != folder.kv:
        raise UserError(f"{source}: {format_name} would describe these modules as something else")
    partial = output.absolute().with_name(output.name + ".partial")
    journal = Journal(partial, {"convert": str(source), "format": format_name}, restart=_is_conversion(partial))
    try:
        writer = ShardWriter(partial, units, SHARD_BYTES)
        rounded = _write(folder, target, writer, requantize)
        copy_side_files(folder.checkpoint.folder, partial)
        for name, content in target.files(settings).items():
            write_json(partial / name, content)
        config = without_quantization(folder.checkpoint.config)
        write_json(partial / "config.json", config | {"quantization_config": settings})
        writer.finish()
        report = ConversionReport(
            str(source),
            folder.name,
            format_name,
            modules=len(folder.schemes),
            schemes=dict(Counter(str(scheme) for scheme in folder.schemes.values())),
            kv_cache=None if folder.cache is None else str(folder.cache),
            rounded=rounded,
            versions=versions(),
            files=file_hashes(partial),
        )
        write_json(partial / REPORT, report.to_json())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    journal.publish(output)
    return report


@dataclass(frozen=True, slots=True)
class Change:
    """How many scales came out different, and the largest relative difference."""

    scales: int = 0
    largest: float = 0.0

    def __add__(self, other: "Change") -> "Change":
        return Change(self.scales + other.scales, max(self.largest, other.largest))


def carry(q: QuantizedWeight, scheme: Scheme, target: Format) -> tuple[dict[str, Tensor], Change]:
    """The module's tensors in the target format, and what became of its scales there.

    UserError where the target cannot hold the codes, the zero points, or scales of that size or sign at all.
    """
    if not target.SIGNED_SCALES and (q.scale_NG < 0).any():
        raise UserError("a scale is negative, which readers of this format do not know")
    dtype = target.scale_dtype(scheme, q.scale_NG.dtype)
    scale_NG, idle_NG = q.scale_NG.to(dtype), _idle(q)
    vanished_NG = idle_NG & (scale_NG.double() != q.scale_NG.double())
    scale_NG = torch.where(vanished_NG, torch.finfo(dtype).tiny, scale_NG)
    tensors = target.pack(replace(q, scale_NG=scale_NG), scheme)
    back = target.unpack(tensors, scheme)
    zeros, codes = (q.zero_NG, back.zero_NG), (q.codes_NK, back.codes_NK)
    if back.spec != q.spec or not _equal(*codes) or not _equal(*zeros):
        raise UserError("codes or zero points would not come back as they are")
    before, after = q.input, back.input
    if (before is None) != (after is None) or (before and after and before.zero != after.zero):
        raise UserError("the range of the inputs would not come back as it is")
    change = _change(q.scale_NG[~idle_NG], back.scale_NG[~idle_NG])
    if before and after:
        change += _change(before.scale, after.scale)
    if q.global_scale is not None and back.global_scale is not None:
        change += _change(*(torch.tensor(value, dtype=torch.float64) for value in (q.global_scale, back.global_scale)))
    return tensors, change


def _refuse_unknown(folder: QuantizedFolder) -> None:
    """UserError for a tensor of a quantized module that its format does not know: its meaning would be lost."""
    form = folder.form
    known = {*form.SUFFIXES, "bias", *(name.rpartition(".")[2] for name in form.KV_NAMES or ())}
    for tensor in folder.checkpoint.tensors:
        module, _, suffix = tensor.rpartition(".")
        if module in folder.schemes and suffix not in known:
            raise UserError(
                f"{folder.checkpoint.folder}: {tensor}: unknown tensor for {folder.name}; refusing to convert"
            )


def _renamed(folder: QuantizedFolder, target: Format) -> dict[str, str]:
    """Name here -> name in the target format of every tensor that is copied as it is."""
    own = {name for module in folder.schemes for name in folder.own(module).values()}
    names = {name: name for name in folder.checkpoint.tensors if name not in own}
    if folder.kv is None:
        return names
    if target.KV_NAMES is None:
        raise UserError(
            f"the format has no place for the scales of a KV cache ({folder.kv}); compressed-tensors has one"
        )
    assert folder.form.KV_NAMES is not None, "a cache of static scales was read from them"
    moved = {
        name: name.removesuffix(here) + there
        for here, there in zip(folder.form.KV_NAMES, target.KV_NAMES, strict=True)
        for name in names
        if name.endswith(f".{here}")
    }
    if not moved:
        raise UserError(f"{folder.checkpoint.folder}: the KV cache is described as {folder.kv}, but has no scales")
    return names | moved


def _write(folder: QuantizedFolder, target: Format, writer: ShardWriter, requantize: bool) -> RoundedScales:
    total, touched = Change(), 0
    for module, scheme in folder.schemes.items():
        q = folder.weight(module)
        try:
            tensors, change = carry(q, scheme, target)
            if change.scales and not requantize:
                raise UserError(
                    f"{change.scales} scales are no numbers of the target (largest change {change.largest:.1e}); "
                    "pass --requantize to round them"
                )
        except UserError as error:
            raise UserError(f"{folder.checkpoint.folder}: {module}: {error}{_elsewhere(folder, module)}") from error
        total, touched = total + change, touched + bool(change.scales)
        for suffix, tensor in tensors.items():
            writer.write(f"{module}.{suffix}", tensor)
    for name, new in _renamed(folder, target).items():
        writer.copy_from(folder.checkpoint, name, new)
    return RoundedScales(touched, total.scales, total.largest)


def _elsewhere(folder: QuantizedFolder, module: str) -> str:
    """The formats that hold a module exactly, in words."""
    names, scheme, q = [], folder.schemes[module], folder.weight(module)
    for name in holders(folder.shape(module), scheme, q.scale_NG.dtype):
        try:
            if not carry(q, scheme, FORMATS[name])[1].scales:
                names.append(name)
        except UserError:
            continue
    return f"; held exactly by: {', '.join(names)}" if names else ""


def _layouts(folder: QuantizedFolder, target: Format, format_name: str) -> list[list[TensorLayout]]:
    """Every tensor of the output, a module's in one unit; UserError for a module the target cannot hold."""
    units: dict[str, list[TensorLayout]] = {}
    for module, scheme in folder.schemes.items():
        shape, dtype = folder.shape(module), folder.scale_dtype(module)
        try:
            announced = target.layout(shape, scheme, target.scale_dtype(scheme, dtype))
        except UserError as error:
            able = ", ".join(holders(shape, scheme, dtype))
            raise UserError(f"{module} cannot become {format_name}: {error}; held by: {able}") from error
        units[module] = [TensorLayout(f"{module}.{suffix}", *kind) for suffix, kind in announced.items()]
    for name, new in _renamed(folder, target).items():
        info = folder.checkpoint.info(name)
        units.setdefault(new.rpartition(".")[0], []).append(TensorLayout(new, info.dtype, tuple(info.shape)))
    return [units[module] for module in sorted(units, key=natural)]


def _idle(q: QuantizedWeight) -> Tensor:
    """Which groups [N, G] of integers stand for zeros alone. Floats: none, for their scales never lack range."""
    (N, G), spec = q.scale_NG.shape, q.spec
    if spec.element == "float":
        return torch.zeros(N, G, dtype=torch.bool)
    zero_NG = torch.full((N, G), spec.levels // 2, dtype=torch.uint8) if q.zero_NG is None else q.zero_NG
    return (q.codes_NK.reshape(N, G, -1) == zero_NG[..., None]).all(-1)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _change(before: Tensor, after: Tensor) -> Change:
    a, b = before.double(), after.double()
    if torch.equal(a, b):
        return Change()
    change = (b - a).abs() / a.abs().clamp(min=1e-300)
    return Change(int(change.count_nonzero()), float(change.max()))


def _is_conversion(partial: Path) -> bool:
    """Whether the folder was left by a conversion that was killed: it then starts again."""
    return "convert" in (read_key(partial) or {})
