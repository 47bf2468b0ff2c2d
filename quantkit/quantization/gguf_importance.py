"""The importance matrix that a GGUF recipe names: read, checked, and given to what is rounded. No torch.

GPTQ needs the whole Hessian of an input, which no importance matrix holds: it takes it from the calibration text. So
the matrix serves whatever is rounded to nearest: linears by `rtn`, experts that no calibration token reached, the
embedding and the head. There it goes before what calibration text says.

Shapes: K = input features, M = matrices of a tensor (its experts, else 1).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import UserError
from quantkit.formats.gguf.imatrix import Imatrix, importance_of, read_imatrix
from quantkit.ggml_types import QUANTIZED
from quantkit.paths import user_path
from quantkit.quantization.gguf_layout import TABLES, GgufPlan
from quantkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from quantkit.quantization.targets import LinearTarget

Importance = Mapping[str, NDArray[np.float32]]  # the checkpoint's name of a weight, without .weight -> E[x^2] [K]

MADE = "hint: make one of this model with `quantkit imatrix`, or remove gguf.imatrix"


def recipe_imatrix(recipe: Recipe) -> tuple[Path, Imatrix] | None:
    """The file of `gguf.imatrix` and what is in it; None where the recipe names none.

    UserError where it is no importance matrix.
    """
    if recipe.gguf is None or recipe.gguf.imatrix is None:
        return None
    path = user_path(recipe.gguf.imatrix)
    try:
        return path, read_imatrix(path)
    except UserError as error:
        raise UserError(f"gguf.imatrix: {error}") from error


def importance_by_name(path: Path, imatrix: Imatrix, plan: GgufPlan) -> dict[str, NDArray[np.float32]]:
    """E[x^2] of each weight that the file has an entry for, by its checkpoint name without .weight, float32 [K].

    UserError where an entry has another width than the tensor, or where none is for this model.
    """
    found: dict[str, NDArray[np.float32]] = {}
    values: dict[str, NDArray[np.float32] | None] = {}
    for name, place in plan.places.items():
        if place.tensor not in values:
            try:
                values[place.tensor] = importance_of(imatrix, place.tensor, plan.shapes[place.tensor])
            except UserError as error:
                raise UserError(f"gguf.imatrix: {path}: {error}") from error
        if (value := values[place.tensor]) is not None:
            found[name.removesuffix(".weight")] = value if place.expert is None else value[place.expert]
    if not found:
        example = min(imatrix.entries)
        raise UserError(f"gguf.imatrix: {path}: no entry is for a tensor of this model (one is for {example})\n{MADE}")
    return found


def check_rounded(path: Path, found: Importance, plan: GgufPlan, rounded: Iterable[str]) -> None:
    """UserError naming the first of the linears `rounded` (checkpoint names) that the file has no entry for."""
    missing = [name for name in rounded if name not in found]
    if missing:
        tensor = plan.places[f"{missing[0]}.weight"].tensor
        more = (
            f" and for {len(missing) - 1} more linears that are rounded" if len(missing) > 1 else ", which is rounded"
        )
        raise UserError(f"gguf.imatrix: {path}: no entry for {tensor} ({missing[0]}){more}\n{MADE}")


def run_importance(
    given: tuple[Path, Imatrix] | None, plan: GgufPlan, linears: "Sequence[LinearTarget]"
) -> dict[str, NDArray[np.float32]]:
    """What weighs those of a run's weights that are, or may be, rounded, as `importance_by_name`; empty without a file.

    linears: what is quantized. UserError where a rounded one has no entry, and where nothing would read the file.
    """
    if given is None:
        return {}
    path, imatrix = given
    found = importance_by_name(path, imatrix, plan)
    rounded = {linear.name: linear for linear in linears if linear.weights.algorithm == "rtn"}
    check_rounded(path, found, plan, rounded)
    experts = {linear.name for linear in linears if linear.site.index is not None}  # rounded where no token comes
    tables = [table for table in TABLES if plan.types.get(table) in QUANTIZED]
    ends = {name.removesuffix(".weight") for table in tables for name in plan.names_of(table)}
    used = {name: value for name, value in found.items() if name in rounded or name in experts or name in ends}
    if not used:
        raise UserError(
            f"gguf.imatrix: {path}: nothing would read it: gptq takes its Hessian from the calibration text, and the "
            "file has no entry for the embedding or the head\n"
            "hint: remove gguf.imatrix, or set weights.algorithm: rtn"
        )
    return used


def importance_remarks(path: Path, imatrix: Imatrix, found: Importance, plan: GgufPlan) -> list[str]:
    """What the report says of the file: experts without a token, a head without an entry."""
    remarks = []
    tensors = {place.tensor for place in plan.places.values()}
    if unreached := {name: count for name, count in imatrix.unreached.items() if name in tensors}:
        remarks.append(
            f"{path.name}: no token reached {sum(unreached.values())} experts in {len(unreached)} tensors (first: "
            f"{min(unreached)}): where they are rounded, all their columns count alike"
        )
    if all(plan.places[f"{name}.weight"].tensor in TABLES for name in found):
        remarks.append(
            f"{path.name}: weighs the embedding and the head alone: the linears are quantized by gptq, which takes its "
            "Hessian from the calibration text"
        )
    head = plan.head
    if plan.types[head] in QUANTIZED and not _has(found, plan, head):
        remarks.append(
            f"{path.name}: no entry for the head ({head}), which is rounded as without an importance matrix: "
            "`quantkit imatrix` writes one"
        )
    return remarks


def _has(found: Importance, plan: GgufPlan, tensor: str) -> bool:
    return any(name.removesuffix(".weight") in found for name in plan.names_of(tensor))
