"""Evaluate a model folder on a text, alone or against the model it was made from.

The loop: for each batch of windows, run both models, reduce the logits to a few numbers per token, forget the logits.
Memory is both models, the logits of one batch and a few bytes per token, however long the text is.
"""

import math
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quantkit.errors import RunError, UserError
from quantkit_eval import bootstrap
from quantkit_eval.bootstrap import Interval
from quantkit_eval.divergence import compare
from quantkit_eval.folders import check_context, check_tokenizers, load_model, load_tokenizer, read_config
from quantkit_eval.perplexity import Windows, cut, read_text, token_losses

BATCH_BYTES = 128 << 20  # of float32 logits of one model per batch
PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "numpy")


class Scores(NamedTuple):
    """Per predicted token, [W, P] on the CPU; all but loss and right are None when there is no reference."""

    loss: NDArray[np.float64]
    right: NDArray[np.float64]
    kl: NDArray[np.float64] | None = None
    agree: NDArray[np.float64] | None = None
    reference_loss: NDArray[np.float64] | None = None
    reference_right: NDArray[np.float64] | None = None


def evaluate(
    path: str | Path,
    *,
    ref: str | Path | None = None,
    text: str | Path,
    context: int = 256,
    max_tokens: int | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity of the model in folder `path` on a text file and, given `ref`, its divergence from that model.

    device "auto" is a GPU where there is one. Models run in float32 on a CPU and in their own dtype elsewhere.
    batch_size is in windows, None picks one.
    UserError for bad input (text, folders, tokenizers that differ, context too long); RunError for NaN or Inf logits.
    """
    source = read_text(text)
    config = read_config(path)
    tokenizer = load_tokenizer(path, trust_remote_code)
    windows = cut(source, tokenizer, context, max_tokens)
    check_context(path, config, context)
    if ref is not None:
        check_context(ref, read_config(ref), context)
        check_tokenizers(path, tokenizer, ref, load_tokenizer(ref, trust_remote_code), source.content)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    model = load_model(path, device, trust_remote_code)
    reference = None if ref is None else load_model(ref, device, trust_remote_code)
    scores = score(model, reference, windows, batch_size=batch_size, progress=progress, names=(str(path), str(ref)))
    return {
        "path": str(path),
        "ref": None if ref is None else str(ref),
        "text": {"path": str(source.path), "sha256": source.sha256, "bytes_per_token": windows.bytes_per_token},
        "context": context,
        "windows": len(windows.ids_WT),
        "tokens": windows.predicted,
        **summarize(scores, windows.bytes_per_token),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }


@torch.inference_mode()
def score(
    model: Any,
    reference: Any | None,
    windows: Windows,
    *,
    batch_size: int | None = None,
    progress: bool = False,
    names: tuple[str, str] = ("model", "reference"),
) -> Scores:
    """Run one or two transformers models over all windows and keep the numbers of each token."""
    W, T = windows.ids_WT.shape
    batches = windows.ids_WT.split(batch_size or _batch_size(model, T))
    columns: list[tuple[NDArray[np.float64], ...]] = []
    with _progress(progress) as bar:
        task = bar.add_task("evaluating", total=W)
        for ids_BT in batches:
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


def summarize(scores: Scores, bytes_per_token: float, seed: int = 0) -> dict[str, Any]:
    """Estimates with 95 % bootstrap intervals; one draw of windows serves all of them, so differences are paired."""
    counts_SW = bootstrap.draw(len(scores.loss), seed)

    def mean(values_WP: NDArray[np.float64]) -> Interval:
        return bootstrap.mean(values_WP.mean(1), counts_SW)

    def surprise(loss_WP: NDArray[np.float64]) -> dict[str, Interval]:
        loss = mean(loss_WP)
        return {"perplexity": _exp(loss), "bits_per_byte": _scaled(loss, 1 / (math.log(2) * bytes_per_token))}

    result: dict[str, Any] = {**surprise(scores.loss), "accuracy": mean(scores.right)}
    if scores.kl is None or scores.agree is None or scores.reference_loss is None or scores.reference_right is None:
        return result
    lost, gained = scores.reference_right > scores.right, scores.right > scores.reference_right
    return result | {
        "perplexity_ratio": _exp(mean(scores.loss - scores.reference_loss)),
        "kl": {"mean": mean(scores.kl), "p99": bootstrap.quantile(scores.kl, counts_SW, 0.99)},
        "top1_agreement": mean(scores.agree),
        "flips": {
            "rate": mean((lost | gained).astype(np.float64)),
            "right_to_wrong": mean(lost.astype(np.float64)),
            "wrong_to_right": mean(gained.astype(np.float64)),
        },
        "reference": {**surprise(scores.reference_loss), "accuracy": mean(scores.reference_right)},
    }


def _exp(interval: Interval) -> Interval:
    # a ruined model's loss can be in the thousands: keep the figure finite, JSON knows no infinity
    value, low, high = (math.exp(min(x, 700.0)) for x in (interval["value"], interval["low"], interval["high"]))
    return {"value": value, "low": low, "high": high}


def _scaled(interval: Interval, factor: float) -> Interval:
    return {
        "value": interval["value"] * factor,
        "low": interval["low"] * factor,
        "high": interval["high"] * factor,
    }


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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found
