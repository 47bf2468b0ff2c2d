"""Quantized folders without the pipeline: grid, format and writer alone, and the dense folder each stands for."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.output_folder import (
    copy_side_files,
)
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import (
    ShardWriter,
    TensorLayout,
)
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import IntegerGrid
from quantkit.types import QuantizedWeight, Scheme, TensorSpec

NOT_LINEAR = re.compile(r".*(norm|ln_|embed|wte|wpe|lm_head|\.gate\.|router).*")


def negate_half(q: QuantizedWeight) -> QuantizedWeight:
    """Half of the scales negated: with the codes as they are, the weights of these groups change sign."""
    sign_NG = torch.where(torch.arange(q.scale_NG.numel()).reshape(q.scale_NG.shape) % 2 == 0, 1, -1)
    return replace(q, scale_NG=q.scale_NG * sign_NG.to(q.scale_NG.dtype))


def pack_folder(
    source: Path,
    packed: Path,
    dense: Path,
    spec: TensorSpec | Callable[[str], TensorSpec | None],
    *,
    scale_dtype: torch.dtype | None = None,
    transposed: bool = False,
    negative: bool = False,
    max_shard: int = 1 << 30,
) -> dict[str, QuantizedWeight]:
    """Write `packed` and its dense equal `dense` from a model folder; returns what was quantized, by module.

    transposed: the source stores [K, N] (Conv1D). scale_dtype None: each weight's own.
    """
    checkpoint = Checkpoint.open(source)
    choose = spec if callable(spec) else lambda _: spec
    linears = [n[:-7] for n, i in checkpoint.tensors.items() if n.endswith(".weight") and len(i.shape) == 2]
    specs = {n: s for n in linears if not NOT_LINEAR.match(n) and (s := choose(n)) is not None}
    quantized: dict[str, QuantizedWeight] = {}
    units: list[list[TensorLayout]] = []
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name in checkpoint.tensors:
        tensor, module = checkpoint.read(name), name.removesuffix(".weight")
        if module == name or module not in specs:
            units.append([TensorLayout(name, tensor.dtype, tuple(tensor.shape))])
            tensors[name] = plain[name] = tensor
            continue
        w_NK = tensor.T if transposed else tensor
        grid = IntegerGrid(specs[module], scale_dtype or tensor.dtype)
        q = grid.quantize(w_NK, *grid.fit(w_NK))
        quantized[module] = q = negate_half(q) if negative else q
        parts = {f"{module}.{suffix}": part for suffix, part in ct.pack(q).items()}
        announced = ct.layout(tuple(w_NK.shape), Scheme(specs[module]), q.scale_NG.dtype)
        units.append([TensorLayout(f"{module}.{suffix}", *kind) for suffix, kind in announced.items()])
        tensors |= parts
        w_NK = dequantize(q).to(tensor.dtype)
        plain[name] = w_NK.T.contiguous() if transposed else w_NK
    write(packed, units, tensors, max_shard)
    write(dense, [[TensorLayout(n, t.dtype, tuple(t.shape))] for n, t in plain.items()], plain, max_shard)
    for folder in (packed, dense):
        copy_side_files(source, folder)
        config = dict(checkpoint.config)
        if folder == packed:
            ignored = [n for n in linears if n not in specs and "embed" not in n and not re.match(r".*(wte|wpe)", n)]
            config["quantization_config"] = ct.config({n: Scheme(s) for n, s in specs.items()}, {*ignored, "lm_head"})
        (folder / "config.json").write_text(json.dumps(config))
    return quantized


def write(folder: Path, units: list[list[TensorLayout]], tensors: dict[str, Tensor], max_shard: int) -> None:
    writer = ShardWriter(folder, units, max_shard)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
