"""A quantized folder's report: what its run recorded, what is measured now or was before, the verdict, three files."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.hub import readme_of
from quantkit.device_names import check_device_name
from quantkit.errors import RunError, UserError
from quantkit.paths import user_path
from quantkit.progress import Mode
from quantkit.report.card import CARD, card_is_ours, model_card
from quantkit.report.console import size_text
from quantkit.report.document import DOCUMENT, Document, measurements_of
from quantkit.report.drawing import check_installed
from quantkit.report.measurements import EngineVerdict, Measurements
from quantkit.report.page import page
from quantkit.report.records import REPORT, Report
from quantkit.report.verdict import judge
from quantkit_eval.report.files import (
    PAGE,
    check_target,
    document_is_ours,
    page_is_ours,
    stored_document,
    write_whole,
)
from quantkit_eval.report.task_results import read_task_results

CONTEXT = 256
LOG = logging.getLogger("quantkit.report")


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A report and the files it lies in. card: None where README.md is somebody else's, which `remark` says."""

    document: Document
    page: Path
    data: Path
    card: Path | None
    remark: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The document, and where it was written."""
        files = {"page": str(self.page), "data": str(self.data), "card": None if self.card is None else str(self.card)}
        return self.document.to_json() | {"files": files}

    def render(self, console: Console) -> None:
        """Print the verdict, and where the report lies."""
        verdict = self.document.verdict
        lines = [f"{verdict.level}: {verdict.reason}", f"page: {self.page}", f"data: {self.data}"]
        lines += [f"card: {self.card}"] if self.card is not None else []
        lines += [f"note: {self.remark}"] if self.remark is not None else []
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_report(
    folder: str | Path,
    *,
    ref: str | Path | None = None,
    texts: Sequence[str | Path] = (),
    results: Path | None = None,
    output: Path | None = None,
    context: int | None = None,
    tokens: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Mode = "auto",
    notes: Sequence[str] = (),
) -> WrittenReport:
    """Report on a folder that a run of quantkit wrote; returns the report and the files.

    ref, texts  the original and texts to compare on (`general` where none is given): measured as by `evaluate`, and
                greedy samples and speed; without both, what an earlier report measured of the same weights is kept
    results     a file with results of tasks
    output      the page, with its JSON beside it; nothing is then written into the folder. None: into the folder, with
                README.md where there is none, or one of ours that nobody has edited
    context     tokens of a window; None: 256, or as many as the model takes
    notes       remarks for the reader
    UserError for bad input, before anything is measured; what quantkit did not write is never overwritten.
    """
    check_installed()
    check_device_name(device)
    if (context is not None or tokens is not None) and ref is None and not texts:
        raise UserError(
            "nothing is measured, so context and tokens say nothing\nhint: give --ref ORIGINAL or --text FILE"
        )
    place = user_path(folder)
    report = load_run(place)
    page_path = place / PAGE if output is None else user_path(output)
    data_path = place / DOCUMENT if output is None else page_path.with_suffix(".json")
    if data_path == page_path:
        raise UserError(f"{page_path}: that name is for the report's JSON\nhint: --output {page_path.stem}.html")
    check_target(page_path, page_is_ours)
    check_target(data_path, document_is_ours)
    tasks = () if results is None else read_task_results(results)
    measured = kept_measurements(place, report)
    if ref is not None or texts:
        measured = replace(
            _measured(str(folder), place, report, ref, texts or ("general",), context, tokens, device,
                      trust_remote_code, progress),
            tasks=measured.tasks,
        )  # fmt: skip
    measured = replace(
        measured,
        tasks=tasks or measured.tasks,
        engines=engine_verdicts(place, report),
        files=report.files,
        notes=tuple(dict.fromkeys((*measured.notes, *notes))),
    )
    document = Document(str(folder), report, measured, judge(report, measured))
    write_whole(page_path, page(document))
    write_whole(data_path, json.dumps(document.to_json(), indent=2, ensure_ascii=False) + "\n")
    if output is not None:
        return WrittenReport(document, page_path, data_path, None)
    card = place / CARD
    if card.exists() and not card_is_ours(_text(card)):
        remark = f"{card} is not quantkit's, or was edited since: left as it is"
        return WrittenReport(document, page_path, data_path, None, remark)
    original = _origin(report, ref)
    name = report.model if original is None else str(original)
    write_whole(card, model_card(document, original, None if name is None else readme_of(name)))
    return WrittenReport(document, page_path, data_path, card)


def report_of_run(
    report: Report, folder: Path, *, device: str = "auto", trust_remote_code: bool = False, progress: Mode = "auto"
) -> WrittenReport:
    """The report of a folder that was just made, measured beside its original on `general` where both have room.

    A measurement that fails leaves a report that says so: the checkpoint is made, and it may be a good one.
    """
    given = {"device": device, "trust_remote_code": trust_remote_code, "progress": progress}
    needed, free = _room(report, device)
    if report.model is None or needed > free:
        short = f"both models need about {size_text(needed)} of memory, {size_text(free)} are free"
        note = "the original is a module in memory" if report.model is None else short
        return write_report(folder, notes=[f"not measured beside the original: {note}"])
    try:
        return write_report(folder, ref=report.model, **given)  # type: ignore[arg-type]
    except (UserError, RunError) as problem:
        reason = str(problem).splitlines()[0]
        LOG.warning("not measured beside the original: %s", reason)
        return write_report(folder, notes=[f"not measured beside the original: {reason}"])


def _room(report: Report, device: str) -> tuple[int, int]:
    """Bytes that both models take, and bytes that are free: a CPU computes in float32, twice the usual 16 bits."""
    import psutil
    import torch

    from quantkit.device_names import torch_device

    where, stored = torch_device(device), report.bytes_before + report.bytes_after
    if where.type == "cuda":
        return stored, torch.cuda.mem_get_info(where)[0]
    return 2 * stored, psutil.virtual_memory().available


def load_run(folder: Path) -> Report:
    """The report of the run that made a folder. UserError where the folder was made otherwise."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}\nhint: give the folder that `quantkit quantize` made")
    if not (folder / REPORT).is_file():
        raise UserError(
            f"{folder}: no {REPORT} in it, so no run of quantkit made it\nhint: `quantkit eval` compares any folder"
        )
    content = read_json(folder / REPORT, "")
    if isinstance(made := content.get("converted"), dict):
        source = made.get("source", "its source")
        raise UserError(f"{folder}: was converted, not quantized, by quantkit\nhint: report on {source}")
    return Report.load(folder)


def kept_measurements(folder: Path, report: Report) -> Measurements:
    """What an earlier report measured of the very same weights; nothing otherwise."""
    found = measurements_of(stored_document(folder))
    return found if found is not None and found.files == report.files else Measurements()


def engine_verdicts(folder: Path, report: Report) -> tuple[EngineVerdict, ...]:
    """What each engine does with the folder, by verify."""
    from quantkit.verification import verify_folder

    tp = (report.recipe.get("output") or {}).get("tp") or 1
    engines = verify_folder(folder, tp=tp).engines or {}
    found = []
    for name, one in engines.items():
        errors = [finding.message for finding in one.findings if finding.level == "error"]
        found.append(EngineVerdict(name, one.verdict, "; ".join(errors[:2])))
    return tuple(found)


def _measured(
    name: str,
    folder: Path,
    report: Report,
    ref: str | Path | None,
    texts: Sequence[str | Path],
    context: int | None,
    tokens: int | None,
    device: str,
    trust_remote_code: bool,
    progress: Mode,
) -> Measurements:
    """What evaluation finds, and with an original greedy samples, speed and its outliers."""
    from quantkit_eval.early_checks import check_before_torch

    positions = longest(folder)
    size = context or (CONTEXT if positions is None else min(CONTEXT, positions))
    check_before_torch(name, ref, texts, context=size, tokens=tokens, device=device)
    from quantkit_eval.evaluation import evaluate

    found = evaluate(
        name, ref=ref, text=texts, context=size, tokens=tokens, device=device, trust_remote_code=trust_remote_code,
        progress=progress,
    )  # fmt: skip
    measured = Measurements(
        ref=found.ref,
        context=found.context,
        bos=found.bos,
        device=found.device,
        dtype=found.dtype,
        texts=found.texts,
        versions=found.versions,
        notes=found.notes,
    )
    if ref is None:
        return measured
    return _beside(measured, name, str(ref), report, texts, positions, device, trust_remote_code)


def _beside(
    measured: Measurements,
    name: str,
    ref: str,
    report: Report,
    texts: Sequence[str | Path],
    positions: int | None,
    device: str,
    trust_remote_code: bool,
) -> Measurements:
    """The measurements with what both models write and how fast, and the original's outliers."""
    from quantkit.device_names import torch_device
    from quantkit_eval.early_checks import check_before_torch
    from quantkit_eval.folders import bos_token, load_model, load_tokenizer
    from quantkit_eval.perplexity import cut
    from quantkit_eval.report.original_outliers import original_outliers
    from quantkit_eval.report.side_by_side import PROMPT_TOKENS, PROMPTS, compare, prompts_from
    from quantkit_eval.texts import read_text

    context = measured.context or CONTEXT
    folder, ref_folder = check_before_torch(name, ref, texts, context=context, device=device)
    assert folder is not None, "the model is a folder"
    assert ref_folder is not None, "a reference was given"
    where = torch_device(device)
    tokenizer, _ = load_tokenizer(folder, trust_remote_code)
    first = bos_token(tokenizer, "auto", name)
    enough = 2 * max(PROMPTS, PROMPT_TOKENS) * context
    cuts = [cut(read_text(text), tokenizer, context, enough, bos=first).ids_WT for text in texts]
    LOG.info("generating with both models")
    reference = load_model(ref_folder, where, trust_remote_code)
    names = [one.name for one in report.linears]
    measured = replace(measured, original_outliers=tuple(original_outliers(reference, names, cuts[0])))
    model = load_model(folder, where, trust_remote_code)
    try:
        samples, speed = compare(model, reference, tokenizer, prompts_from(cuts, positions), positions)
    except RunError as error:
        return replace(measured, notes=(*measured.notes, f"nothing was generated: {error}"))
    if report.gguf is None:
        return replace(measured, samples=tuple(samples), speed=speed)
    note = "the GGUF file was decoded to float32, so its speed is llama.cpp's to measure: `quantkit bench`"
    return replace(measured, samples=tuple(samples), notes=(*measured.notes, note))


def longest(folder: Path) -> int | None:
    """How many tokens a model takes, by its config.json; None where that does not say."""
    from quantkit_eval.early_checks import positions_of

    try:
        return positions_of(read_json(folder / "config.json", ""))
    except (UserError, OSError):
        return None


def _origin(report: Report, ref: str | Path | None) -> Path | None:
    """The folder of the original, where its card lies, if it is on this machine."""
    for name in (ref, report.model):
        if name is not None and (place := user_path(name)).is_dir():
            return place
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
