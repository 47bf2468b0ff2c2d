"""Evaluate a model on texts, alone or against the model it was made from.

The loop: for each batch of windows, run both models, reduce the logits to a few numbers per token, forget the logits.
Memory is both models, the logits of one batch and a few bytes per token, however long a text is.
"""

import logging
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quantkit.api import is_module
from quantkit.cache_spec import cache_named
from quantkit.device_names import torch_device
from quantkit.errors import RunError, UserError
from quantkit.progress import Mode, check_mode
from quantkit_eval import bootstrap
from quantkit_eval.acceptance import acceptance as acceptance_of
from quantkit_eval.cached_model import CachedModel
from quantkit_eval.divergence import compare
from quantkit_eval.early_checks import check_before_torch, text_names
from quantkit_eval.folders import bos_token, check_tokenizers, load_model, load_tokenizer, remarks
from quantkit_eval.held_modules import given_tokenizer, model_name, module_device, without_training
from quantkit_eval.llama_cpp_library import LlamaCppModel
from quantkit_eval.paged_model import PagedModel
from quantkit_eval.perplexity import Windows, cut, token_losses
from quantkit_eval.results import (
    Acceptance,
    Divergence,
    Evaluation,
    Interval,
    PositionSurprise,
    Surprise,
    TextResult,
)
from quantkit_eval.texts import Text, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERAL_TOKENS = 1 << 14  # of `general`, unless a number is given
POSITIONS = 8  # parts of a window with a perplexity of their own
BATCH_BYTES = 128 << 20  # of float32 logits of one model per batch
PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "numpy")
LOG = logging.getLogger("quantkit.eval")


class Scores(NamedTuple):
    """Per predicted token, [W, P] on the CPU; all but loss and right are None when there is no reference."""

    loss: NDArray[np.float64]
    right: NDArray[np.float64]
    kl: NDArray[np.float64] | None = None
    agree: NDArray[np.float64] | None = None
    reference_loss: NDArray[np.float64] | None = None
    reference_right: NDArray[np.float64] | None = None


def evaluate(
    model: "str | Path | PreTrainedModel",
    *,
    ref: "str | Path | PreTrainedModel | None" = None,
    text: str | Path | Sequence[str | Path] = "general",
    context: int = 256,
    tokens: int | None = None,
    device: str = "auto",
    bos: Literal["auto", "always", "never"] = "auto",
    engine: str | None = None,
    kv_cache: str | None = None,
    acceptance: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Mode = True,
) -> Evaluation:
    """Perplexity of a model on one or several texts and, given `ref`, its divergence from that model.

    model, ref  folders, Hub ids or GGUF files, quantized or not; a GGUF file is decoded to float32. Or modules of
                transformers in memory: they are run as they are, where they are, without dropout, and left as they were
    text        UTF-8 files, lines of text themselves, and names: `general` (the part of quantkit's own texts that
                nothing is calibrated on) and `wikitext2` (its test part, from the Hub); one of them or a sequence
    context     tokens of a window; a text is cut into consecutive windows, and a last one that is not full is dropped
    tokens      at most so many of each text, from its start; None: all, and of `general` the first 16384
    device      auto: a GPU where there is one, beside a module its own. Folders run in float32 on a CPU and in their
                own dtype elsewhere.
    bos         whether windows begin with the tokenizer's begin-of-sequence token. auto: where the tokenizer itself
                puts it before a text. Only tokens of the text are predicted and counted, never the token itself.
    engine      llama.cpp: `model` is a GGUF file, and llama-cpp-python runs it; paged: quantkit's paged engine runs it,
                in chunks and on pages as it generates, and transformers the original; None: transformers runs both
    kv_cache    the format of the model's cached keys and values, int8 or keys=int8,values=int4 (see `cache_named`),
                whatever its folder says; none: as computed; None: as its folder says
    acceptance  also let the model draft for its original: which share of its guesses is right (by the paged engine,
                caches as computed)
    tokenizer   of a module; None: the one of the folder beside it, or of the folder that it came from
    progress    a bar, where stderr is a terminal, unless plain, off or False

    Losses are in nats, intervals are 95 % by a bootstrap over windows. Raises UserError for bad input (texts, folders,
    tokenizers that differ, a context that is too long), most of it before torch is imported; RunError for NaN or Inf
    in the logits.
    """
    bar = check_mode(progress) == "auto"
    names = text_names(text)
    folder, ref_folder = check_before_torch(
        model, ref, names, context=context, tokens=tokens, device=device, bos=bos, engine=engine, kv_cache=kv_cache,
        acceptance=acceptance,
    )  # fmt: skip
    sources = [read_text(name) for name in names]
    held = [value for value in (model, ref) if is_module(value)]
    where = torch_device(device) if not held else module_device(held, device)
    called, original = model_name(model), None if ref is None else model_name(ref)
    own = folder if tokenizer is None else None  # whose tokenizer is the one that is used
    tokenizer, notes = given_tokenizer(tokenizer, folder, ref_folder, held, trust_remote_code)
    first = bos_token(tokenizer, bos, called)
    # `general` is for a first look, which must not take hours on a large model; a text that was chosen is read whole
    most = {"general": GENERAL_TOKENS} if tokens is None else {}
    cuts = [cut(source, tokenizer, context, most.get(source.name, tokens), bos=first) for source in sources]
    for place, name in ((folder, called), (ref_folder, str(original))):
        if place is None or place is own:
            continue
        other, more = load_tokenizer(place, trust_remote_code)
        notes += [line for line in more if line not in notes]
        for source in sources:
            check_tokenizers(called, tokenizer, name, other, source.content)

    started = time.perf_counter()
    LOG.info("loading %s", called)
    loaded: Any = model
    run, more = loaded, list[str]()
    if folder is not None:
        loaded, run, more = _opened(folder, called, engine, context, where, kv_cache, trust_remote_code)
    reference: Any = ref
    if ref_folder is not None:
        LOG.info("loading %s", original)
        reference = load_model(ref_folder, where, trust_remote_code)
    drafts: list[Acceptance | None] = [None] * len(sources)
    if acceptance:  # first: a model that the engine refuses is refused at once
        LOG.info("%s drafts for %s", called, original)
        draft = loaded.llm.runner.model if engine == "paged" else loaded
        drafts = [acceptance_of(reference, draft, windows) for windows in cuts]
    results = []
    for source, windows, drafted in zip(sources, cuts, drafts, strict=True):
        LOG.info("evaluating on %s: %d windows of %d tokens", source.name, len(windows.ids_WT), context)
        with without_training(*held):
            scores = score(run, reference, windows, progress=bar, names=(called, str(original)))
        results.append(replace(summarize(scores, source, windows), acceptance=drafted))
    return Evaluation(
        model=called,
        ref=original,
        context=context,
        bos=first is not None,
        texts=tuple(results),
        device=str(where),
        dtype=str(loaded.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
        versions=versions() | ({"llama-cpp-python": loaded.version} if engine == "llama.cpp" else {}),
        engine=engine,
        kv_cache=kv_cache,
        notes=(*notes, *more, *([] if folder is None else remarks(folder, engine))),
    )


def _opened(
    folder: Path, name: str, engine: str | None, context: int, where: torch.device, kv_cache: str | None, trusted: bool
) -> tuple[Any, Any, list[str]]:
    """The model, what is called in its place to get logits, and remarks on these."""
    if engine == "llama.cpp":
        loaded = LlamaCppModel(folder, context)
        return loaded, loaded, []
    if engine == "paged":
        loaded = PagedModel(folder, context, where, kv_cache, trust_remote_code=trusted)
        return loaded, loaded, [loaded.remark]
    loaded = load_model(folder, where, trusted)
    return loaded, loaded if kv_cache is None else CachedModel(loaded, name, cache_named(kv_cache)), []


@torch.no_grad()  # not inference mode: what a module in memory keeps of a run must go on to serve its training
def score(
    model: Any,
    reference: Any | None,
    windows: Windows,
    *,
    progress: bool = False,
    names: tuple[str, str] = ("model", "reference"),
) -> Scores:
    """Run one or two transformers models over all windows and keep the numbers of each token."""
    W, T = windows.ids_WT.shape
    columns: list[tuple[NDArray[np.float64], ...]] = []
    with _progress(progress) as bar:
        task = bar.add_task("evaluating", total=W)
        for ids_BT in windows.ids_WT.split(_batch_size(model, T)):
            ids_BT = ids_BT.to(model.device)
            logits_BTV = _logits(model, ids_BT, names[0])
            if reference is None:
                per_token = token_losses(logits_BTV, ids_BT)
            else:
                reference_BTV = _logits(reference, ids_BT, names[1])
                if reference_BTV.shape != logits_BTV.shape:
                    raise UserError(
                        f"{names[0]} and {names[1]} cannot be compared: "
                        f"their logits are {logits_BTV.shape[-1]} and {reference_BTV.shape[-1]} wide"
                    )
                c = compare(logits_BTV, reference_BTV, ids_BT)
                per_token = (c.loss, c.right, c.kl, c.agree, c.reference_loss, c.reference_right)
            columns.append(tuple(column.double().cpu().numpy() for column in per_token))
            bar.advance(task, len(ids_BT))
    return Scores(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


def summarize(scores: Scores, text: Text, windows: Windows, seed: int = 0) -> TextResult:
    """Estimates with 95 % bootstrap intervals; one draw of windows serves all of them, so differences are paired."""
    counts_SW = bootstrap.draw(len(scores.loss), seed)

    def mean(values_WP: NDArray[np.float64]) -> Interval:
        return bootstrap.mean(values_WP.mean(1), counts_SW)

    def surprise(loss_WP: NDArray[np.float64], right_WP: NDArray[np.float64]) -> Surprise:
        loss = mean(loss_WP)
        return Surprise(loss.exp(), loss.scaled(1 / (math.log(2) * windows.bytes_per_token)), mean(right_WP))

    divergence = None
    if (
        scores.kl is not None
        and scores.agree is not None
        and scores.reference_loss is not None
        and scores.reference_right is not None
    ):
        lost, gained = scores.reference_right > scores.right, scores.right > scores.reference_right
        divergence = Divergence(
            perplexity_ratio=mean(scores.loss - scores.reference_loss).exp(),
            kl_mean=mean(scores.kl),
            kl_p99=bootstrap.quantile(scores.kl, counts_SW, 0.99),
            top1_agreement=mean(scores.agree),
            flips=mean((lost | gained).astype(np.float64)),
            right_to_wrong=mean(lost.astype(np.float64)),
            wrong_to_right=mean(gained.astype(np.float64)),
            reference=surprise(scores.reference_loss, scores.reference_right),
        )
    own = surprise(scores.loss, scores.right)

    def position(part_P: NDArray[np.intp]) -> PositionSurprise:
        first, last, loss_WP = int(part_P[0]) + 1, int(part_P[-1]) + 1, scores.loss[:, part_P]
        if scores.reference_loss is None:
            return PositionSurprise(first, last, mean(loss_WP).exp())
        reference_WP = scores.reference_loss[:, part_P]
        ratio = mean(loss_WP - reference_WP).exp()
        return PositionSurprise(first, last, mean(loss_WP).exp(), mean(reference_WP).exp(), ratio)

    parts = np.array_split(np.arange(scores.loss.shape[1]), POSITIONS)
    positions = tuple(position(part_P) for part_P in parts if part_P.size)
    sizes = windows.bytes_per_token, len(windows.ids_WT), windows.predicted
    return TextResult(text.name, text.sha256, *sizes, own, divergence, positions)


def _logits(model: Any, ids_BT: torch.Tensor, name: str) -> torch.Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    if not torch.isfinite(logits_BTV).all():
        raise RunError(f"{name}: NaN or Inf in the logits")
    return logits_BTV


def _batch_size(model: Any, T: int) -> int:
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(32, BATCH_BYTES // (4 * T * vocabulary)))


def _progress(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (wanted and sys.stderr.isatty()))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found
