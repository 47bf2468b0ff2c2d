"""Units: the linears that get one candidate together, with what each candidate makes of them.

Linears that an engine merges into one layer (q, k and v; gate and up) are one unit, and so are all experts of a layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.errors import UserError
from quantkit.formats import FORMATS
from quantkit.quantization.dense_modules import ignored_names
from quantkit.quantization.engine_check import check_engine
from quantkit.quantization.targets import Candidate as Matrix
from quantkit.quantization.targets import LinearTarget, Targets, resolve
from quantkit.recipe.candidates import DENSE, Candidate
from quantkit.recipe.load import from_data
from quantkit.recipe.recipe import Recipe
from quantkit.verification.subject import FUSING, fused_name

Tensors = Mapping[str, TensorInfo | TensorLayout]


def entry_bytes(name: str, tag: str, shape: Sequence[int], widest: int) -> int:
    """Bytes of a tensor's entry in the header of a safetensors file, its two offsets as long as `widest`."""
    frame = '"":{"dtype":"","shape":[],"data_offsets":[,]},'
    sizes = ",".join(map(str, shape))
    return len(name.encode()) + len(frame) + len(tag) + len(sizes) + 2 * len(str(widest))


@dataclass(frozen=True, slots=True)
class Option:
    """What a unit may become.

    candidate  its name, or DENSE
    targets    its linears with what is done to them; none where they stay as they are stored
    bits       of its weights: codes, scales and zero points
    nbytes     of a file: all its tensors and their entries in the header, counted at their longest
    """

    candidate: str
    targets: tuple[LinearTarget, ...]
    bits: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears of a block that move together.

    options  at least DENSE, the last; refused: candidate -> why not
    """

    name: str
    block: int
    members: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]
    refused: Mapping[str, str]


def find_units(
    base: Recipe,
    candidates: Sequence[Candidate],
    matrices: Iterable[Matrix],
    never: Mapping[str, str],
    tensors: Tensors,
    config: Mapping[str, Any],
) -> list[Unit]:
    """The units of a model in order of the blocks.

    base      what holds for all candidates: output format, engine, tensor parallelism
    never     name -> why, of matrices that no recipe can quantize; tensors: of the source; config: its config.json
    UserError where no unit can become any of the candidates, with the reasons.
    """
    matrices = list(matrices)
    recipes = {one.name: from_data({**_settings(base), **one.keys}) for one in candidates}
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.limit is None:
            groups.setdefault(_unit_name(matrix.name, base.output.engine), []).append(matrix)
    left_out = {**never, **{matrix.name: DENSE for matrix in matrices}}
    finder = _OptionFinder(recipes, left_out, tensors, config)
    units = [finder.unit(name, members) for name, members in groups.items()]
    if not any(len(unit.options) > 1 for unit in units):
        reasons = dict.fromkeys(f"{name}: {why}" for unit in units for name, why in unit.refused.items())
        where = f" that {base.output.engine} loads" if base.output.engine else ""
        raise UserError("\n".join([f"--candidates: no linear can become any of them{where}:", *list(reasons)[:8]]))
    return units


def _settings(base: Recipe) -> dict[str, Any]:
    return {key: value for key, value in base.resolved().items() if key not in ("weights", "scheme", "activations")}


def _unit_name(name: str, engine: str | None) -> str:
    """The layer that an engine makes of a linear and its siblings; an engine that merges none: the linear."""
    stem, separator, rest = name.partition(".experts.")
    if separator and rest.split(".")[0].isdigit():
        return f"{stem}.experts"
    return (fused_name(name) if engine is None or engine in FUSING else None) or name


class _OptionFinder:
    """Finds the options of units; those of equal linears of other blocks are judged once.

    left_out  name -> why, of all matrices, as if none were quantized
    """

    def __init__(
        self, recipes: Mapping[str, Recipe], left_out: dict[str, str], tensors: Tensors, config: Mapping[str, Any]
    ) -> None:
        self.recipes, self.left_out, self.tensors, self.config = recipes, left_out, tensors, config
        self._judged: dict[tuple, str | None] = {}
        self._widest = sum(info.nbytes for info in tensors.values())  # no offset in a file is longer than this

    def unit(self, name: str, members: list[Matrix]) -> Unit:
        options, refused = [], {}
        for candidate, recipe in self.recipes.items():
            found = self._targets(candidate, recipe, members)
            if isinstance(found, str):
                refused[candidate] = found
            else:
                options.append(self._quantized(candidate, recipe, found))
        weights = sum(matrix.numel for matrix in members)
        stored = {f"{matrix.name}.weight": self.tensors[f"{matrix.name}.weight"] for matrix in members}
        layouts = [TensorLayout(tensor, info.dtype, tuple(info.shape)) for tensor, info in stored.items()]
        nbytes = sum(layout.nbytes for layout in layouts)
        options.append(Option(DENSE, (), 8 * nbytes, nbytes + sum(map(self._entry, layouts))))
        names = tuple(matrix.name for matrix in members)
        return Unit(name, members[0].block, names, weights, tuple(options), refused)

    def _targets(self, candidate: str, recipe: Recipe, members: list[Matrix]) -> tuple[LinearTarget, ...] | str:
        """What a candidate makes of the linears, or why it cannot."""
        try:
            targets = tuple(resolve(recipe, members, {}).linears)
        except UserError as refusal:
            return str(refusal)
        key = (candidate, tuple((m.name.rpartition(".")[2], m.shape, m.dtype) for m in members))
        if key not in self._judged:
            self._judged[key] = self._refusal(recipe, targets)
        return self._judged[key] or targets

    def _refusal(self, recipe: Recipe, targets: tuple[LinearTarget, ...]) -> str | None:
        """Why the recipe's engine would not load these linears, the rest of the model as it is stored."""
        names = {target.name for target in targets}
        skipped = {name: why for name, why in self.left_out.items() if name not in names}
        ignored = ignored_names(skipped, self.tensors, names)
        try:
            check_engine(recipe, Targets(list(targets), list(skipped.items()), ignored), self.tensors, self.config)
        except UserError as refusal:
            first, *reasons = str(refusal).splitlines()
            return reasons[0] if reasons else first
        return None

    def _quantized(self, candidate: str, recipe: Recipe, targets: tuple[LinearTarget, ...]) -> Option:
        format_, bits, nbytes = FORMATS[recipe.output.format], 0, 0
        for target in targets:
            for suffix, (dtype, shape) in format_.layout(target.shape, target.scheme, target.scale_dtype).items():
                layout = TensorLayout(f"{target.name}.{suffix}", dtype, torch.Size(shape))
                bits += 8 * layout.nbytes * (suffix != "weight_shape")
                nbytes += layout.nbytes + self._entry(layout)
        return Option(candidate, targets, bits, nbytes)

    def _entry(self, layout: TensorLayout) -> int:
        return entry_bytes(layout.name, layout.tag, layout.shape, self._widest)
