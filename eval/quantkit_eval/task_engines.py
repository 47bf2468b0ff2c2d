"""What runs a model for lm-eval: transformers' code and today's kernels, or the paged engine.

Both score continuations and generate.

Shapes: B = rows, T = tokens of a row, K = positions, R = scored tokens of a batch, V = vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quantkit.cache_spec import cache_named
from quantkit.errors import RunError
from quantkit.runtime.engine.request import SamplingParams
from quantkit_eval.cached_model import NAMES, CachedModel
from quantkit_eval.folders import load_model
from quantkit_eval.paged_model import PagedModel
from quantkit_eval.prefix_rows import Continuation, Row, batches, model_inputs, pack

AUTO_ROWS, AUTO_TOKENS = 64, 8192  # of a batch whose size is `auto`
SCORE_CELLS = 1 << 25  # logits in float32 that are reduced at a time
NOISE = 0.02  # of the logits' standard deviation: what rounding may do to a row that is computed beside another

Score = tuple[float, bool]  # log-likelihood in nats; whether greedy decoding would give these tokens


class TaskEngine(Protocol):
    """A loaded model. tokens_left of generate: at most so many are generated."""

    config: Any

    def score(self, requests: Sequence[Continuation], *, apart: bool = False) -> Iterator[tuple[int, Score]]: ...

    def generate(
        self, prompts: Sequence[list[int]], tokenizer: Any, stop: list[str], most: int, options: dict[str, Any]
    ) -> list[str]: ...


class PlainEngine:
    """`quantkit.load`, run by transformers. kv_cache: as of `cache_named`; None: as the folder says.

    batch_size  contexts of a forward; None: as many as AUTO_TOKENS hold. Continuations of one context lie in one row
                (see prefix_rows) where the model computes them there as it does apart, which is tried once.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: Any,
        kv_cache: str | None,
        batch_size: int | None,
        trusted: bool,
    ) -> None:
        self.model = load_model(folder, device, trusted, dtype)
        self.config, self.name, self.batch_size = self.model.config, str(folder), batch_size
        cache = None if kv_cache is None else cache_named(kv_cache)
        self._cached = None if kv_cache is None else CachedModel(self.model, self.name, cache)
        self._run: Any = self._cached or self.model
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.longest = self._longest_packed()

    @torch.inference_mode()
    def _longest_packed(self) -> int | None:
        """The longest list of tokens that may share a row; 0 where the model cannot do it, None: any.

        Sliding windows see as far as full attention up to their width, and a mask of ours replaces the model's.
        """
        V = self.config.get_text_config().vocab_size
        start, long, short = ([(7 * i + offset) % V for i in range(n)] for offset, n in ((1, 6), (3, 17), (2, 5)))
        requests = [Continuation([*start, *end, 0], 1 + len(end)) for end in (long, short)]
        (row,) = pack(requests, longest=None)
        try:
            together = self._logits([row], np.arange(len(row.ids)))[0][0, row.paths[row.members.index([1])]]
        except Exception:  # whatever code makes of a mask and positions that it does not know
            self._keeps = False
            together = None
        apart = self._logits(pack(requests[1:], longest=0))[0][0]
        if together is None or not torch.allclose(together, apart, rtol=0, atol=float(NOISE * apart.std())):
            return 0
        return _window(self.config.get_text_config())

    def _logits(self, rows: list[Row], keep: Any = None) -> tuple[Tensor, np.ndarray]:
        """Logits [B, K, V] and the positions that they are of; keep: int64 [K], those that are wanted; None: all."""
        inputs: dict[str, Any] = model_inputs(rows, self.model.dtype, self.model.device)
        if keep is not None and self._keeps:
            inputs["logits_to_keep"] = torch.from_numpy(keep).to(self.model.device)
        logits_BKV = self._run(**inputs, use_cache=False).logits
        if keep is not None and logits_BKV.shape[1] == len(keep):
            return logits_BKV, keep
        return logits_BKV, np.arange(logits_BKV.shape[1])

    @torch.inference_mode()
    def score(self, requests: Sequence[Continuation], *, apart: bool = False) -> Iterator[tuple[int, Score]]:
        """The number of each request and its score, as batches are done; apart: no two in one row."""
        rows = pack(requests, longest=0 if apart else self.longest)
        size, tokens = (AUTO_ROWS, AUTO_TOKENS) if self.batch_size is None else (self.batch_size, None)
        for batch in batches(rows, size, tokens):
            yield from self._score_batch(batch, requests)

    def _score_batch(self, rows: list[Row], requests: Sequence[Continuation]) -> Iterator[tuple[int, Score]]:
        """Each list's logits are those of the last tokens of its path."""
        members = [
            (b, path, i)
            for b, row in enumerate(rows)
            for path, own in zip(row.paths, row.members, strict=True)
            for i in own
        ]
        places = [path[-requests[i].scored :] for _, path, i in members]
        logits_BKV, kept = self._logits(rows, np.unique(np.concatenate(places)))
        row_R = np.repeat([b for b, _, _ in members], [len(place) for place in places])
        target_R = torch.tensor([t for _, _, i in members for t in requests[i].targets], device=logits_BKV.device)
        logp_R, right_R = _scored(logits_BKV, row_R, np.searchsorted(kept, np.concatenate(places)), target_R)
        if not np.isfinite(logp_R).all():
            raise RunError(f"{self.name}: NaN or Inf in the logits")
        start = 0
        for (_, _, i), place in zip(members, places, strict=True):
            own = slice(start, start := start + len(place))
            yield i, (float(logp_R[own].sum()), bool(right_R[own].all()))

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], tokenizer: Any, stop: list[str], most: int, options: dict[str, Any]
    ) -> list[str]:
        """What the model writes behind each prompt, up to a stop string or `most` tokens; prompts of any length."""
        from lm_eval.models.utils_hf import stop_sequences_criteria

        written: list[str] = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        size = self.batch_size or AUTO_ROWS
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            T = max(len(prompts[i]) for i in batch)
            ids_BT = torch.tensor([[pad] * (T - len(prompts[i])) + prompts[i] for i in batch])
            seen_BT = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            if self._cached is not None:
                options = {**options, self._cached.argument or NAMES[0]: self._cached.fresh_cache()}
            out_BL = self.model.generate(
                input_ids=ids_BT.to(self.model.device),
                attention_mask=seen_BT.to(self.model.device),
                max_new_tokens=most,
                stopping_criteria=stop_sequences_criteria(tokenizer, stop, T, len(batch)),
                pad_token_id=pad,
                use_cache=True,
                **options,
            )
            for i, ids in zip(batch, out_BL.tolist(), strict=True):
                written[i] = tokenizer.decode(ids[T:], skip_special_tokens=True)
        return written


class PagedEngine:
    """The paged engine: its pages, kernels and cache formats. Each list of tokens is a request of its own."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        context: int | None,
        kv_cache: str | None,
        batch_size: int | None,
        trusted: bool,
    ) -> None:
        model = PagedModel(folder, context, device, kv_cache, trust_remote_code=trusted)
        self.llm, self.config, self.name = model.llm, model.config, str(folder)
        self.batch_size = batch_size or AUTO_ROWS

    def score(self, requests: Sequence[Continuation], *, apart: bool = False) -> Iterator[tuple[int, Score]]:
        """The number of each request and its score, as batches are done."""
        rows = pack(requests, longest=0)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            found = [(i, index) for index, row in enumerate(batch) for own in row.members for i in own]
            logp: dict[int, list[Any]] = {i: [] for i, _ in found}
            of_row: dict[int, list[int]] = {}
            for i, index in found:
                of_row.setdefault(index, []).append(i)

            def take(index: int, start: int, logits_RV: Tensor, of_row: Any = of_row, logp: Any = logp) -> None:
                for i in of_row[index]:
                    request = requests[i]
                    first = len(request.inputs) - request.scored  # the position of the first logits that count
                    low = max(first, start) - start
                    if low < len(logits_RV):
                        targets = request.targets[start + low - first : start + len(logits_RV) - first]
                        target_R = torch.tensor(targets, device=logits_RV.device)
                        places = np.arange(low, len(logits_RV))
                        logp[i].append(_scored(logits_RV[None], np.zeros_like(places), places, target_R))

            self.llm.logits([row.ids for row in batch], take)
            for i, _ in found:
                logp_R, right_R = (np.concatenate(parts) for parts in zip(*logp[i], strict=True))
                if not np.isfinite(logp_R).all():
                    raise RunError(f"{self.name}: NaN or Inf in the logits")
                yield i, (float(logp_R.sum()), bool(right_R.all()))

    def generate(
        self, prompts: Sequence[list[int]], tokenizer: Any, stop: list[str], most: int, options: dict[str, Any]
    ) -> list[str]:
        """What the engine writes behind each prompt, up to a stop string or `most` tokens."""
        if not options.pop("do_sample", False):
            options["temperature"] = 0.0
        outputs = self.llm.generate(list(prompts), SamplingParams(max_tokens=most, stop=stop, **options))
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise RunError(f"{self.name}: {failed}")
        return [output.outputs[0].text for output in outputs]


def _scored(
    logits_BKV: Tensor, row_R: np.ndarray, place_R: np.ndarray, target_R: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities float64 [R] of the targets in nats, and whether each is the likeliest token."""
    logp, right = [], []
    step = max(1, SCORE_CELLS // logits_BKV.shape[-1])
    for start in range(0, len(row_R), step):
        at = slice(start, start + step)
        rows_RV = logits_BKV[torch.from_numpy(row_R[at]), torch.from_numpy(place_R[at])].float()
        chosen_R = rows_RV.gather(1, target_R[at, None])[:, 0]
        logp.append((chosen_R - rows_RV.logsumexp(1)).double().cpu().numpy())
        right.append((rows_RV.argmax(1) == target_R[at]).cpu().numpy())
    return np.concatenate(logp), np.concatenate(right)


def _window(config: Any) -> int | None:
    """The narrowest of the windows that layers attend to; None where all see everything before them."""
    kinds = set(getattr(config, "layer_types", None) or ())
    local = not kinds or any("full" not in kind for kind in kinds)
    names = ("sliding_window", "attention_chunk_size") if local else ()
    widths = [width for name in names if isinstance(width := getattr(config, name, None), int)]
    return min(widths, default=None)
