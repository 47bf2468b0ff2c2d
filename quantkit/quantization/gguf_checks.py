"""What a GGUF recipe asks of a model, judged before any work: architecture, settings, types, importance matrix.

All of it follows from config.json and headers, without torch. The tokenizer is judged next, when its keys are read.
"""

from collections.abc import Mapping
from typing import Any

from quantkit.ggml_types import QUANTIZED
from quantkit.quantization.gguf_budget import measured_budget
from quantkit.quantization.gguf_importance import check_rounded, importance_by_name, recipe_imatrix
from quantkit.quantization.gguf_layout import GgufPlan, Tensors, plan_before
from quantkit.recipe.gguf import Measured
from quantkit.recipe.recipe import Recipe


def check_gguf(recipe: Recipe, config: Mapping[str, Any], tensors: Tensors) -> None:
    """UserError for what config.json and headers show to be wrong with the recipe's `gguf` section for this model.

    config, tensors: of the model as it is stored. Nothing is asked of a recipe without the section.
    """
    if recipe.gguf is None:
        return
    if recipe.gguf.pre is not None:
        from quantkit.formats.gguf.pre import check_name  # which takes a moment to load

        check_name(recipe.gguf.pre)
    plan = plan_before(recipe, config, tensors)
    if isinstance(recipe.gguf.mix, Measured):
        measured_budget(recipe.gguf, plan.shapes, {})
    if (given := recipe_imatrix(recipe)) is not None:
        path, imatrix = given
        found = importance_by_name(path, imatrix, plan)
        check_rounded(path, found, plan, _surely_rounded(recipe, plan))


def _surely_rounded(recipe: Recipe, plan: GgufPlan) -> list[str]:
    """Linears that are rounded whatever classes they are of; those of more involved recipes are known when traced."""
    if recipe.weights.algorithm != "rtn" or recipe.overrides or set(recipe.ignore) - {"lm_head"}:
        return []
    return [
        name.removesuffix(".weight")
        for name, place in plan.places.items()
        if place.tensor.startswith("blk.") and plan.types[place.tensor] in QUANTIZED
    ]
