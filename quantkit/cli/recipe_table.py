"""What each shipped recipe gives, takes and reached: the rows of `quantkit recipes`. No torch here."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.recipe.load import load, recipe_names, recipe_text
from quantkit.recipe.number_formats import Activations, Weights
from quantkit.recipe.recipe import Recipe, uncalibrated
from quantkit.recipe.sections import merged
from quantkit.verification import ENGINES, DeclaredNumbers, DeclaredScheme, judge_gguf, judge_schemes
from quantkit.verification.engines.hardware import find_machine

GPUS = ("Turing", "Ampere", "Ada", "Hopper", "Blackwell")  # oldest first
MEASURED = re.compile(
    r"Measured: KL (?P<kl>[\d.]+), top-1 agreement (?P<top1>[\d.]+) %, perplexity (?P<perplexity>[\d.]+) .*?, "
    r"(?P<bits>[\d.]+) bits per weight on (?P<model>[^;]+); (?P<how>[^.]+(?:\.\w[^.]*)*)\."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a recipe reached: kl in nats, top1 in percent, perplexity; on which model, and how it was calibrated."""

    kl: float
    top1: float
    perplexity: float
    model: str
    how: str


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """One shipped recipe.

    algorithm    transforms first: "awq+gptq"
    calibration  "needed", "used" (it works without) or "none"
    activations  "16-bit", "int8", "fp8 static", ...; of all schemes in it
    engines      engine -> what each kind of machine does with it; an engine that refuses it is absent
    fast         engine -> kinds of machines with a kernel that computes in its number formats
    """

    name: str
    summary: str
    bits_per_weight: float
    algorithm: str
    calibration: str
    activations: str
    kv_cache: str | None
    format: str
    engines: dict[str, dict[str, str]]
    fast: dict[str, tuple[str, ...]]
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipes(engine: str | None = None, machine: str | None = None) -> list[RecipeRow]:
    """The shipped recipes by size, best first; those alone that an engine takes, or that are fast on a machine.

    machine: as users name it (h100, cuda:8.6, cpu); asked of `engine`, vLLM where none is named.
    UserError for an engine or a machine that is not known.
    """
    if engine is not None:
        judge_schemes((), engine)
    kind = None if machine is None else find_machine(machine)
    found = [_row(name) for name in recipe_names()]
    if engine is not None:
        found = [row for row in found if engine in row.engines]
    if kind is not None:
        found = [row for row in found if runs_fast(row, engine or "vllm", kind)]
    return sorted(found, key=lambda row: (round(row.bits_per_weight), row.measured.kl))


def runs_fast(row: RecipeRow, engine: str, kind: str) -> bool:
    """Whether a row's number formats have a kernel on that kind of machine; "Blackwell" means all of its kinds."""
    here = [name for name in row.engines.get(engine, ()) if name.startswith(kind) or kind.startswith(name)]
    return bool(here) and set(here) <= set(row.fast[engine])


def fast_gpus(row: RecipeRow, engine: str) -> str:
    """The GPU generations with a fast kernel, in short: "Ada+", "Turing-Hopper", "-"."""
    able = [any(name.startswith(gpu) for name in row.fast.get(engine, ())) for gpu in GPUS]
    names = [gpu for gpu, yes in zip(GPUS, able, strict=True) if yes]
    if not names:
        return "-"
    if names == [gpu for gpu in GPUS if GPUS.index(gpu) >= GPUS.index(names[0])]:
        return names[0] if len(names) == 1 else f"{names[0]}+"
    return f"{names[0]}-{names[-1]}" if len(names) > 1 else names[0]


def _row(name: str) -> RecipeRow:
    recipe, text = load(name), recipe_text(name)
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    found = MEASURED.search(header)
    assert found is not None, f"{name} does not say what it reached"
    declared = [] if recipe.gguf else _declared(recipe)
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    sides = () if recipe.kv_cache is None else recipe.kv_cache.sides
    stored = any(side is not None and side.scope != "token" for side in sides)  # all other caches are quantkit's own
    engines, fast = {}, {}
    for engine in ENGINES:
        if recipe.gguf:
            findings, runs = judge_gguf(engine)
        else:
            findings, runs = judge_schemes(declared, engine, cache if stored else None)
        if any(finding.level == "error" for finding in findings):
            continue
        # where inputs stay as they are, a kernel that quantizes nothing but weights is the whole of it
        good = ("yes",) if any(said.inputs for said in declared) else ("yes", "weight-only")
        engines[engine] = runs
        fast[engine] = tuple(machine for machine, how in runs.items() if how in good)
    without = recipe.resolved() | {"calibration": None}
    calibration = "none" if recipe.calibration is None else "needed" if uncalibrated(without) else "used"
    inputs = dict.fromkeys(_inputs(activations) for _, activations in _schemes(recipe))
    return RecipeRow(
        name=name,
        summary=text.partition("\n")[0].lstrip("# "),
        bits_per_weight=float(found["bits"]),
        algorithm="+".join([*(transform.name for transform in recipe.transforms), recipe.weights.algorithm]),
        calibration=calibration,
        activations="/".join(inputs),
        kv_cache="/".join(dict.fromkeys("16-bit" if side is None else side.type for side in sides)) or None,
        format=recipe.output.format,
        engines=engines,
        fast=fast,
        measured=Measured(
            float(found["kl"]), float(found["top1"]), float(found["perplexity"]), found["model"], found["how"]
        ),
    )


def _schemes(recipe: Recipe) -> list[tuple[Weights, Activations | None]]:
    """Weights and activations of the recipe and of its overrides that quantize."""
    found = [(recipe.weights, recipe.activations)]
    for override in recipe.overrides:
        if not override.skip:
            weights = recipe.weights if override.weights is None else merged(recipe.weights, override.weights)
            given = override.activations if "activations" in override.model_fields_set else recipe.activations
            found.append((weights, given))
    return found


def _inputs(activations: Activations | None) -> str:
    return "16-bit" if activations is None else activations.type + ("" if activations.dynamic else " static")


def _declared(recipe: Recipe) -> Sequence[DeclaredScheme]:
    """The recipe's number formats as a compressed-tensors config will state them."""
    return [
        DeclaredScheme(_layout(weights, inputs), _weights(weights), None if inputs is None else _activations(inputs))
        for weights, inputs in _schemes(recipe)
    ]


def _layout(weights: Weights, inputs: Activations | None) -> str:
    if weights.type == "int":
        whole = weights.bits == 8 and isinstance(weights.group_size, str) and inputs is not None
        return "int-quantized" if whole else "pack-quantized"
    if weights.type == "fp8":
        return "float-quantized" if inputs else "naive-quantized"
    return {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}.get(weights.type, "mxfp8-quantized")


def _weights(weights: Weights) -> DeclaredNumbers:
    kind = "int" if weights.type == "int" else "float"
    if isinstance(weights.group_size, str):
        block = (128, 128) if weights.group_size == "block" else None
        return DeclaredNumbers(weights.bits, kind, weights.symmetric, weights.group_size, block=block)
    strategy = "tensor_group" if weights.type == "nvfp4" else "group"
    scale = "uint8" if weights.type.startswith("mx") else None
    return DeclaredNumbers(weights.bits, kind, weights.symmetric, strategy, weights.group_size, scale_dtype=scale)


def _activations(inputs: Activations) -> DeclaredNumbers:
    kind, bits = "int" if inputs.type == "int8" else "float", 4 if inputs.type in ("nvfp4", "mxfp4") else 8
    size = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(inputs.type)
    if size is None and isinstance(inputs.group_size, int):
        size = inputs.group_size
    if size is not None:
        strategy = "tensor_group" if inputs.type == "nvfp4" else "group"
        dynamic = "local" if inputs.type == "nvfp4" else True
        scale = "uint8" if inputs.type.startswith("mx") else None
        return DeclaredNumbers(bits, kind, True, strategy, size, dynamic=dynamic, scale_dtype=scale)
    strategy = "token" if inputs.dynamic else "tensor"
    return DeclaredNumbers(bits, kind, inputs.symmetric, strategy, dynamic=inputs.dynamic)
