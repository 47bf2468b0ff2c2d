"""The schemes that a model may be served in: what each stores, and whether an engine runs it on a device."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import UserError
from quantkit.formats import FORMATS
from quantkit.planner.devices import Device
from quantkit.planner.model_inventory import ModelInventory
from quantkit.planner.output_size import gguf_bytes, planned_gguf, planned_targets, resolved, sizes
from quantkit.planner.served_model import SERVED, StoredWeights
from quantkit.quantization.engine_check import planned_findings
from quantkit.quantization.output_layout import quantization_config
from quantkit.recipe.load import load
from quantkit.recipe.names import BEST
from quantkit.recipe.recipe import Recipe
from quantkit.verification import Finding, verify_layout

UNQUANTIZED = "bf16"
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One scheme.

    name     of the scheme, bf16, or `recipe` for the one that was given; recipe: the shipped one that makes it
    stored   None where the scheme cannot be made of this model
    bits     per quantized weight, scales included
    refused  why it cannot be made, or why the engine does not load it there; warnings: what the engine would remark
    """

    name: str
    recipe: str | None
    stored: StoredWeights | None
    bits: float
    refused: str | None = None
    warnings: tuple[str, ...] = ()


def candidates(
    inventory: ModelInventory,
    config: Mapping[str, Any],
    engine: str,
    device: Device,
    tp: int,
    given: Recipe | None,
) -> list[Candidate]:
    """bf16, every scheme that has a shipped recipe, and the recipe that was given.

    config: of config.json
    """
    found, few = [_unquantized(inventory, config, engine, device, tp)], one_expert(inventory)
    for scheme, name in BEST.items():
        found.append(shipped(scheme, name, few, config, engine, device, tp))
    if given is not None:
        whole = Sample(inventory)
        found.append(_candidate("recipe", None, _served_by(given, engine, tp), whole, config, engine, device))
    return found


@dataclass(frozen=True, slots=True)
class Sample:
    """An inventory in which each expert stands for `copies` that are like it."""

    inventory: ModelInventory
    copies: int = 1


def one_expert(inventory: ModelInventory) -> Sample:
    """The inventory with one expert of each layer: shipped recipes treat all alike, and there may be ten thousand.

    The whole inventory where layers differ in their number of experts.
    """
    named = [EXPERT.search(matrix.name) if matrix.expert else None for matrix in inventory.matrices]
    counts = Counter(m.block for m, expert in zip(inventory.matrices, named, strict=True) if expert)
    kept = [m for m, expert in zip(inventory.matrices, named, strict=True) if expert is None or expert[1] == "0"]
    firsts = Counter(matrix.block for matrix in kept if matrix.expert)
    copies = {count / firsts[block] if firsts[block] else 0.0 for block, count in counts.items()}
    if len(copies) != 1 or not (number := copies.pop()).is_integer() or number < 2:
        return Sample(inventory)
    dropped = {f"{m.name}.weight" for m in inventory.matrices} - {f"{m.name}.weight" for m in kept}
    tensors = {name: info for name, info in inventory.tensors.items() if name not in dropped}
    return Sample(replace(inventory, matrices=kept, tensors=tensors), int(number))


def shipped(
    scheme: str,
    name: str,
    sample: Sample,
    config: Mapping[str, Any],
    engine: str,
    device: Device,
    tp: int,
    cache: str | None = None,
) -> Candidate:
    """A scheme by its shipped recipe. cache: a format of the cache that the engine is to read as well, fp8 or int8."""
    sets = [f"output.engine={engine}", f"output.tp={tp}", *([] if cache is None else [f"kv_cache={cache}"])]
    try:
        recipe = load(name, sets)
    except UserError as refusal:  # the recipe's own format is not the engine's
        return Candidate(scheme, name, None, 0.0, str(refusal).splitlines()[-1])
    return _candidate(scheme, name, recipe, sample, config, engine, device)


def _served_by(recipe: Recipe, engine: str, tp: int) -> Recipe:
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"engine": engine, "tp": tp})})


def _unquantized(
    inventory: ModelInventory, config: Mapping[str, Any], engine: str, device: Device, tp: int
) -> Candidate:
    params = inventory.params
    stored = StoredWeights(SERVED * sum(params.values()), SERVED * params["experts"])
    found = verify_layout(inventory.tensors, {}, config, engine, tp, hardware=device.name)
    return Candidate(UNQUANTIZED, None, stored, 8.0 * SERVED, *_judged(found))


def _candidate(
    name: str,
    shipped: str | None,
    recipe: Recipe,
    sample: Sample,
    config: Mapping[str, Any],
    engine: str,
    device: Device,
) -> Candidate:
    inventory = sample.inventory
    try:
        gguf = planned_gguf(recipe, inventory, config)
        jobs, found = resolved(recipe, inventory, gguf)
        size, bits = sizes(recipe, inventory, jobs)
        findings: list[Finding] = []
        if gguf is not None:
            size = gguf_bytes(recipe, inventory, gguf, found)
        else:
            targets = planned_targets(recipe, inventory, found)
            settings = quantization_config(targets, FORMATS[recipe.output.format])
            whole = {**config, "quantization_config": settings}
            findings = planned_findings(recipe, targets, inventory.tensors, whole, engine, device.name)
            if targets.kv is not None and targets.stored_kv is None:
                raise UserError(f"{engine} does not read a {targets.kv} cache")
    except UserError as refusal:
        return Candidate(name, shipped, None, 0.0, str(refusal).partition("\nhint:")[0])
    experts, more = [job for job in jobs if job.matrix.expert], sample.copies - 1
    expert_numel = sum(job.matrix.numel for job in experts)
    numel = sum(job.matrix.numel for job in jobs) + more * expert_numel
    expert_size, expert_bits = sizes(recipe, inventory, experts)
    size, bits = size + more * (expert_size - inventory.stored), bits + more * expert_bits
    if gguf is None:  # what stays as it is may be float32 in the checkpoint, and is served in 16 bits
        size -= (inventory.dtype.itemsize - SERVED) * (sum(inventory.params.values()) - numel)
    expert_numel *= sample.copies
    held = SERVED * (inventory.params["experts"] - expert_numel) + sample.copies * expert_bits // 8
    stored = StoredWeights(size, held, numel, expert_numel, _kind(recipe))
    return Candidate(name, shipped, stored, bits / max(1, numel), *_judged(findings))


def _kind(recipe: Recipe) -> str:
    """The format of most products; without rounded inputs weights are unpacked to 16 bits."""
    given = recipe.activations
    if given is None or recipe.gguf is not None:
        return UNQUANTIZED
    return {"int8": "int8", "fp8": "fp8", "mxfp8": "fp8"}.get(given.type, "fp4")


def _judged(found: list[Finding]) -> tuple[str | None, tuple[str, ...]]:
    errors = [f"{finding.where}: {finding.message}" for finding in found if finding.level == "error"]
    return (errors or [None])[0], tuple(f"{each.where}: {each.message}" for each in found if each.level == "warning")
