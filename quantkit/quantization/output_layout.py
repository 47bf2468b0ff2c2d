"""What the output will hold: its tensors, and the quantization_config that describes them."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.errors import RunError
from quantkit.formats import Format
from quantkit.quantization.targets import Targets


def file_layout(
    tensors: Mapping[str, TensorInfo | TensorLayout], targets: Targets, format_: Format
) -> list[list[TensorLayout]]:
    """Every tensor of the output, in natural order of the source's `tensors`; a shard never cuts a unit (module)."""
    quantized = {f"{linear.name}.weight": linear for linear in targets.linears}
    units: dict[str, list[TensorLayout]] = {}
    for name in sorted(tensors, key=_natural):
        info = tensors[name]
        unit = units.setdefault(name.rpartition(".")[0], [])
        if name in quantized:
            linear = quantized[name]
            for suffix, (dtype, shape) in format_.layout(linear.shape, linear.scheme, linear.scale_dtype).items():
                unit.append(TensorLayout(f"{linear.name}.{suffix}", dtype, shape))
        else:
            unit.append(TensorLayout(name, info.dtype, tuple(info.shape)))
    for layout in (*chain.from_iterable(targets.kv_scales), *targets.extra):
        units.setdefault(layout.name.rpartition(".")[0], []).append(layout)
    return list(units.values())


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def quantization_config(targets: Targets, format_: Format) -> dict[str, Any]:
    """The quantization_config of the output's config.json.

    UserError where the format cannot describe the targets; RunError where its own reader would read something else.
    """
    schemes = targets.schemes
    settings = format_.config(schemes, targets.ignored, targets.stored_kv)
    read = format_.read_config(settings, [*schemes, *targets.ignored])
    if read != schemes:
        wrong = sorted(name for name in read.keys() | schemes if read.get(name) != schemes.get(name))
        raise RunError(f"config.json would describe {', '.join(wrong[:3])} as something else than what is written")
    return settings
