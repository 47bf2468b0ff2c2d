"""A model of quantkit for EleutherAI's lm-eval: `--model quantkit --model_args pretrained=FOLDER`.

lm-eval 0.4.13 takes models of its own alone: `quantkit lm-eval` is its command with this one registered. Later versions
find it by the entry point `quantkit` of the group `lm_eval.models`, or by `--plugins quantkit_eval.lm_eval_model`.

Requests are tokenized as lm-eval's `hf` model does it, so that log-likelihoods of an unquantized folder are its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.models  # noqa: F401  (lm-eval lists its own models only while its registry is empty)
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from tqdm import tqdm

from quantkit.cache_spec import cache_named
from quantkit.checkpoint.gguf_path import find_gguf
from quantkit.checkpoint.hub import locate_model
from quantkit.device_names import check_device_name, torch_device
from quantkit.errors import UserError
from quantkit.suggestions import unknown
from quantkit_eval.folders import load_tokenizer
from quantkit_eval.prefix_rows import Continuation
from quantkit_eval.task_engines import PagedEngine, PlainEngine, TaskEngine

ENGINES = ("plain", "paged")
ARGUMENTS = (
    *("pretrained", "kv_cache", "device", "batch_size", "max_length", "engine"),
    *("dtype", "trust_remote_code", "max_batch_size"),
)
MOST_TOKENS = 256  # generated where a task does not say how many, as of `hf`


class QuantkitLM(TemplateLM):
    """A folder of quantkit or of others, a Hub id or a GGUF file, quantized or not.

    pretrained   the model
    kv_cache     rounds cached keys and values: int8, keys=int8;values=int4, none; None: as the model's folder says
    device       cpu, cuda, cuda:1 ..., auto: a GPU where there is one
    batch_size   contexts of a forward, each with all its continuations; auto: as many as 8192 tokens hold
    max_length   tokens of context and continuation; None: the model's
    engine       plain: quantkit.load and transformers; paged: the engine of `quantkit generate`
    dtype        auto: float32 on a CPU, the model's own elsewhere

    UserError for what is wrong with these.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        kv_cache: str | None = None,
        device: str | None = "auto",
        batch_size: int | str | None = 1,
        max_length: int | None = None,
        engine: str = "plain",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise unknown("argument of model_args", next(iter(others)), ARGUMENTS)
        if not isinstance(pretrained, str | Path) or not str(pretrained):
            raise UserError("no model\nhint: --model_args pretrained=FOLDER")
        if engine not in ENGINES:
            raise unknown("engine", str(engine), ENGINES)
        check_device_name(device := str(device or "auto"))
        if kv_cache is not None:
            cache_named(kv_cache := str(kv_cache).replace(";", ","))  # a comma ends an argument of model_args
        self._rows = _rows(batch_size, max_batch_size)
        folder = find_gguf(str(pretrained)) or locate_model(str(pretrained))
        self.tokenizer, _ = load_tokenizer(folder, trust_remote_code)
        self._device = torch_device(device)
        self._given_length = _length(max_length)
        self.pretrained = str(pretrained)
        self.engine: TaskEngine
        if engine == "plain":
            wanted = None if dtype == "auto" else dtype
            self.engine = PlainEngine(folder, self._device, wanted, kv_cache, self._rows, trust_remote_code)
        else:
            if dtype != "auto":
                raise UserError("dtype is of engine=plain\nhint: leave it out")
            self.engine = PagedEngine(folder, self._device, self._given_length, kv_cache, self._rows, trust_remote_code)

    @property
    def batch_size(self) -> int | str:
        """As it was given: contexts of a forward, or auto."""
        return self._rows or "auto"

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self._given_length or resolve_max_length(self.engine.config, self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are generated where a task does not say how many."""
        return MOST_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. UserError where the tokenizer has none."""
        if (found := self.tokenizer.eos_token_id) is None:
            raise UserError(f"{self.pretrained}: its tokenizer has no end-of-sequence token")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the tokenizer's first token, or its last."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of prompts."""
        return str(self.tokenizer.name_or_path or self.pretrained).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; a template that takes no system message gets none."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise UserError(f"{self.pretrained}: it has no chat template\nhint: leave out --apply_chat_template")
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.exceptions.TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, and none where the text begins with the first one."""
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            options = {"add_special_tokens": False} if has_bos_prefix(string, first) else {}
        else:
            options = {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **options)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, apart: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """Log-likelihood and whether it is greedy, of each continuation; contexts are cut at their start to fit.

        apart: no two in one row. UserError for a continuation of no tokens, or of more than the model reads.
        """
        for text, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored, for the model reads "
                    f"{self.max_length}: {str(text)[:60]!r}"
                )
        rows = [
            Continuation((context + continuation)[-(self.max_length + 1) :], len(continuation))
            for _, context, continuation in requests
        ]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        bar = tqdm(total=len(rows), desc="Running loglikelihood requests", disable=disable_tqdm)
        for i, score in self.engine.score(rows, apart=apart):
            results[i] = score
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
            bar.update(1)
        bar.close()
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows of the model's context that do not overlap."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            fresh = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            windows += fresh
            owners += [i] * len(fresh)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm, apart=True), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each prompt, up to the first stop string, which is left out.

        UserError where a task's tokens leave no room for its prompt.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        results = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm)
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        for members in groups.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks))
            stop = handle_stop_sequences(options.pop("until", None), eos=end)
            most = options.pop("max_gen_toks")
            if most >= self.max_length:
                raise UserError(
                    f"a task asks for {most} tokens, and the model reads {self.max_length} with the prompt\n"
                    "hint: --gen_kwargs max_gen_toks=N"
                )
            if not options.get("do_sample"):
                options.pop("temperature", None)
            prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - most) :] for i in members]
            for i, text in zip(
                members, self.engine.generate(prompts, self.tokenizer, stop, most, options), strict=True
            ):
                results[i] = postprocess_generated_text(text, stop, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
                bar.update(1)
        bar.close()
        return results

    def get_model_info(self) -> Mapping[str, Any]:
        """What lm-eval writes beside its results."""
        return {"model_dtype": str(getattr(self.engine.config, "dtype", "")), "pretrained": self.pretrained}


def _rows(batch_size: int | str | None, most: int | None) -> int | None:
    """Contexts of a forward; None for auto. UserError for what is no number."""
    text = str(1 if batch_size is None else batch_size)
    if text == "auto" or text.startswith("auto:"):
        return most
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size is {batch_size!r}; expected a whole number of 1 or more, or auto")
    return int(text)


def _length(max_length: int | None) -> int | None:
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise UserError(f"max_length is {max_length!r}; expected a whole number of 2 or more")
    return max_length


if "quantkit" not in model_registry:  # else an entry point stands for this very class
    register_model("quantkit")(QuantkitLM)
