"""A model to a size: measure harms, choose candidates, write the recipe, and run it as any recipe is run."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.journal import Journal, refuse_foreign
from quantkit.checkpoint.output_folder import versions
from quantkit.checkpoint.reader import Checkpoint
from quantkit.device_names import torch_device
from quantkit.errors import RunError, UserError
from quantkit.model.block_graph import BlockGraph
from quantkit.model.streamed_model import StreamedModel
from quantkit.progress import Mode, Progress
from quantkit.quantization import pipeline
from quantkit.quantization.allocation.choice import Budget, budget_for, choose
from quantkit.quantization.allocation.context import ContextRuns, Shares, scaled, shares_left
from quantkit.quantization.allocation.harms import HarmMeter, Harms
from quantkit.quantization.allocation.recipe_text import recipe_of, recipe_text
from quantkit.quantization.allocation.units import Option, Unit, find_units
from quantkit.quantization.calibration.data import CalibrationTokens, data_fingerprint
from quantkit.quantization.early_checks import check_before_torch
from quantkit.quantization.resources import reuse_pages
from quantkit.quantization.targets import traced_candidates
from quantkit.recipe.candidates import Candidate
from quantkit.recipe.recipe import Recipe
from quantkit.report.allocation_record import AllocationRecord, CandidateShare
from quantkit.sizes import SizeLimit

RECIPE, HARMS = "recipe.yaml", "quantkit-auto.json"  # in the result


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model with its units and the text that their harms are measured on."""

    base: Recipe
    candidates: Sequence[Candidate]
    streamed: StreamedModel
    graphs: list[BlockGraph]
    tokens: CalibrationTokens
    units: list[Unit]

    def budget(self, limit: SizeLimit) -> Budget:
        shard = int(self.base.output.max_shard_gb * 1e9)
        return budget_for(limit, self.units, self.streamed.checkpoint.tensors, shard)


def quantize_to_size(
    base: Recipe,
    limit: SizeLimit,
    candidates: Sequence[Candidate],
    output: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Mode = True,
) -> AllocationRecord:
    """Quantize base.model into the new folder `output`, of at most the size `limit`, with the least harm.

    base  model, calibration text, output format, engine; what it says of weights does not count
    The harms of finished blocks lie in OUTPUT.harms until the result is there: a run that was killed goes on with them.
    UserError for bad input, a size that cannot be and candidates that no linear can become, before anything is
    measured; RunError for a run that failed.
    """
    with Progress(progress) as bar:
        model = prepare(base, candidates, output, bar, device=device, trust_remote_code=trust_remote_code)
        budget = model.budget(limit)
        journal = open_journal(model, output, restart=restart)
        harms = measured_harms(model, journal, bar)
        choice = choice_for(
            model, harms, budget, journal, bar, {"device": device, "trust_remote_code": trust_remote_code}
        )
    text = recipe_for(model, choice, budget)
    beside = {RECIPE: text, HARMS: json.dumps(_record(model, harms, choice, limit), indent=2) + "\n"}
    report = pipeline.quantize(
        recipe_of(text),
        output,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=progress,
        beside=beside,
    )
    shutil.rmtree(work_folder(output))
    if report.held_out is None:
        raise RunError(f"{output} is finished, but its KL could not be measured: the model has no logits")
    files = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    bits = sum(option.bits for option in choice.options.values()) / budget.weights
    kl, shares = (choice.predicted, report.held_out.kl, report.held_out.tokens), _shares(model.units, choice.options)
    return AllocationRecord(str(output), limit.text, bits, files, *kl, shares, report.warnings)


def work_folder(output: Path) -> Path:
    """Where the harms that are measured lie until the result is finished."""
    return output.with_name(output.name + ".harms")


def prepare(
    base: Recipe,
    candidates: Sequence[Candidate],
    output: Path,
    bar: Progress,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreparedModel:
    """Read and trace the model; UserError for bad input, candidates that nothing can become, too little text."""
    refuse_foreign(work_folder(output))
    # An unfinished run in OUTPUT.partial has the recipe that was chosen, not `base`: it is compared later.
    folder = check_before_torch(base, output, device=device, restart=True)
    bar.stage("loading model")
    reuse_pages()
    checkpoint = Checkpoint.open(folder)
    streamed, tokens, _ = pipeline.prepare(base, checkpoint, torch_device(device), trust_remote_code, None)
    assert tokens is not None, "harms require calibration text"
    if tokens.held_out_HT is None:
        raise UserError(
            "the calibration text has no window left to measure on\nhint: give more text, or fewer --samples"
        )
    bar.stage("tracing")
    graphs = pipeline.trace_all(streamed, folds=False)
    matrices, never = traced_candidates(graphs, streamed, checkpoint.tensors)
    units = find_units(base, candidates, matrices, never, checkpoint.tensors, checkpoint.config)
    return PreparedModel(base, candidates, streamed, graphs, tokens, units)


def open_journal(model: PreparedModel, output: Path, *, restart: bool = False) -> Journal:
    """What an interrupted run has measured; UserError where it measured something else."""
    key: dict[str, Any] = {
        "recipe": model.base.settings(),
        "candidates": [one.name for one in model.candidates],
        "model": model.streamed.checkpoint.fingerprint(),
        "calibration": data_fingerprint(model.tokens.ids_ST),
        "versions": versions(),
        "device": model.streamed.device.type,
    }
    return Journal(work_folder(output), key, restart=restart)


def measured_harms(model: PreparedModel, journal: Journal, bar: Progress) -> Harms:
    """The harm of every unit under each of its options, alone; those in the journal are read, the others added."""
    tokens, blocks = model.tokens, len(model.streamed.blocks)
    assert tokens.held_out_HT is not None
    known = [entry["harms"] for entry in journal.entries if "harms" in entry]
    harms: Harms = {unit: found for each in known for unit, found in each.items()}
    if len(known) == blocks:
        return harms
    bar.stage(
        f"harm of {len(model.units)} units of linears under {len(model.candidates)} candidates, "
        f"KL on {tokens.held_out_HT.numel():,} tokens"
    )
    bar.begin(blocks, len(known))
    texts, format_name = (tokens.ids_ST, tokens.held_out_HT), model.base.output.format
    meter = HarmMeter(model.streamed, model.graphs, *texts, format_name, journal.folder)
    for _ in known:
        meter.skip()
        bar.replayed()
    bar.start_blocks()
    for index in range(len(known), blocks):
        found = meter.measure([unit for unit in model.units if unit.block == index], bar.note)
        journal.append({"block": index, "harms": found})
        harms |= found
        bar.advance()
    return harms


@dataclass(frozen=True, slots=True)
class Choice:
    """An option for each unit.

    shares     of each unit's harms that a run leaves; predicted: the sum of what is left, nats per token
    """

    options: Mapping[str, Option]
    shares: Shares
    predicted: float


def choice_for(
    model: PreparedModel, harms: Harms, budget: Budget, journal: Journal, bar: Progress, run: Mapping[str, Any]
) -> Choice:
    """The options with the least harm in a run; run: how `pipeline.quantize` is called."""
    runs = ContextRuns(model.base, model.candidates, model.units, journal, run)
    first = choose(model.units, harms, budget)
    shares = shares_left(runs, harms, first, lambda what: bar.stage(f"harm that a whole run leaves: {what}"))
    left = scaled(harms, shares)
    options = choose(model.units, left, budget)
    return Choice(options, shares, sum(left[name][option.candidate] for name, option in options.items()))


def recipe_for(model: PreparedModel, choice: Choice, budget: Budget) -> str:
    """The text of the recipe of a choice."""
    bits = sum(option.bits for option in choice.options.values()) / budget.weights
    comments = [
        f"Written by `quantkit auto --max-size {budget.limit.text}`: {bits:.4g} bits per weight of the linears, KL "
        f"{choice.predicted:.3g} predicted.",
        f"To change it, edit a copy and run it: quantkit quantize --recipe {RECIPE} --output NEW",
    ]
    return recipe_text(model.base, model.candidates, model.units, choice.options, comments)


def _record(model: PreparedModel, harms: Harms, choice: Choice, limit: SizeLimit) -> dict[str, Any]:
    """What is kept of the measurement: each unit's harms, what it became, and why not something else."""
    units = {
        unit.name: {
            "linears": list(unit.members),
            "candidate": choice.options[unit.name].candidate,
            "kl": harms[unit.name],
            "share_left": choice.shares[unit.name],
            "bits_per_weight": {option.candidate: option.bits / unit.weights for option in unit.options},
            "refused": dict(unit.refused),
        }
        for unit in model.units
    }
    return {"max_size": limit.text, "predicted_kl": choice.predicted, "units": units}


def _shares(units: Sequence[Unit], chosen: Mapping[str, Option]) -> tuple[CandidateShare, ...]:
    linears, weights = Counter[str](), Counter[str]()
    for unit in units:
        name = chosen[unit.name].candidate
        linears[name] += len(unit.members)
        weights[name] += unit.weights
    return tuple(CandidateShare(name, linears[name], w / weights.total()) for name, w in weights.most_common())
