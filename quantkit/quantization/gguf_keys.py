"""All keys of a run's GGUF file: the model's, the tokenizer's, and how the file was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.gguf_writer import KeyValue
from quantkit.checkpoint.model_folder import TOKENIZERS
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.imatrix import Imatrix, used_keys
from quantkit.formats.gguf.metadata import origin
from quantkit.formats.gguf.mixes import file_type, file_type_of
from quantkit.formats.gguf.model_name import name_remarks
from quantkit.formats.gguf.remarks import file_remarks
from quantkit.formats.gguf.tokenizer import check_tokenizer, tokenizer_metadata
from quantkit.quantization.gguf_importance import Importance, importance_remarks
from quantkit.quantization.gguf_layout import GgufPlan, Tensors, plan_before
from quantkit.recipe.recipe import Recipe
from quantkit.report.records import CalibrationRecord


def tokenizer_keys(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, KeyValue]:
    """The keys of the checkpoint's tokenizer, and the model's name; none for a recipe that makes no GGUF.

    UserError where llama.cpp has no such tokenizer: asked before any work.
    """
    if recipe.gguf is None:
        return {}
    plan = plan_before(recipe, checkpoint.config, checkpoint.tensors)
    name = plan.metadata["general.name"][1]
    return tokenizer_metadata(checkpoint.folder, plan.vocabulary, pre=recipe.gguf.pre, name=name)


def check_planned_tokenizer(recipe: Recipe, folder: Path, plan: GgufPlan) -> None:
    """UserError where `tokenizer_keys` would refuse the tokenizer in `folder`; a folder may have none yet."""
    if recipe.gguf is not None and any((folder / name).is_file() for name in TOKENIZERS):
        check_tokenizer(folder, plan.vocabulary, pre=recipe.gguf.pre)


def file_metadata(
    plan: GgufPlan,
    recipe: Recipe,
    tokenizer: Mapping[str, KeyValue],
    calibration: CalibrationRecord | None,
    imatrix: tuple[Path, Imatrix] | None,
) -> dict[str, KeyValue]:
    """The keys of the file, as they are written; tokenizer: those of `tokenizer_keys`."""
    section = recipe.gguf
    assert section is not None
    number = file_type(section.mix) if isinstance(section.mix, str) else file_type_of(plan.types, plan.shapes)
    used = {} if imatrix is None else used_keys(imatrix[0].name, imatrix[1])
    made = origin(recipe.settings(), None if calibration is None else calibration.to_json())
    return plan.metadata | {**tokenizer, "general.file_type": ("u32", number)} | used | made


def gguf_remarks(
    plan: GgufPlan,
    config: Mapping[str, Any],
    tensors: Tensors,
    imatrix: tuple[Path, Imatrix] | None,
    importance: Importance,
    tokenizer: Mapping[str, KeyValue] | None = None,
) -> list[str]:
    """What a user should know of the file, for the report.

    config, tensors: of the model the file is made of; tokenizer: its keys where they are known
    """
    name = plan.metadata["general.name"]
    named = name_remarks(name[1], (tokenizer or {}).get("general.name", name)[1])
    given = [] if imatrix is None else importance_remarks(*imatrix, importance, plan)
    return file_remarks(config, tensors) + named + given
