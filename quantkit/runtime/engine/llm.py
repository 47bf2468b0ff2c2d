"""LLM: prompts in, tokens out. The names are vLLM's, so that an offline script of its runs with the import changed.

llm = LLM("out/folder", kv_cache="int8")
for output in llm.generate(["def f(", "class A:"], SamplingParams(temperature=0, max_tokens=32)):
    print(output.outputs[0].text)
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantkit.errors import UserError
from quantkit.runtime.engine.blocks import BlockManager
from quantkit.runtime.engine.engine import Engine, Prompt
from quantkit.runtime.engine.model_source import cache_blocks, check_draft, end_tokens, load_source
from quantkit.runtime.engine.request import RequestOutput, SamplingParams, UnknownFieldError
from quantkit.runtime.engine.runner import Runner
from quantkit.runtime.engine.scheduler import Scheduler
from quantkit.runtime.engine.speculation import Drafter, DraftModel, PromptLookup


class LLM(Engine):
    """A model ready to generate. Several requests run at a time, each at its own place.

    model       a folder (plain or quantized), a Hub id, a GGUF file, or a loaded model of transformers
    dtype       as in quantkit.load; None or "auto": as its config says
    kv_cache    None: as the checkpoint says, else in the model's dtype; "int8", "int4", "fp8", "auto" (the model's
                dtype), a KVSpec, or {"keys": .., "values": ..} of these
    max_num_seqs, max_num_batched_tokens   requests that run at a time; tokens of a step
    enable_prefix_caching   prompts that begin alike share the blocks of their beginning
    tokenizer   where `model` is a loaded one; without a tokenizer prompts are token ids and outputs have no text
    block_size, num_blocks  tokens of a block, 1 to 256; blocks of the cache (None: as many as all requests need, in a
                quarter of the memory that is free; of a GPU's in `gpu_memory_utilization`)
    max_model_len   tokens of a prompt and its output together; None: the model's context
    speculate   "ngram": guess tokens by what followed the same words before; draft: a smaller model that guesses
    seed        of requests that have none
    clock       seconds; a simulation may have its own

    UserError, before weights are read, for a model whose kind the engine does not run.
    """

    def __init__(
        self, model: str | os.PathLike[str] | PreTrainedModel, dtype: torch.dtype | str | None = None,
        kv_cache: Any = None, max_num_seqs: int = 32, max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True, *, tokenizer: PreTrainedTokenizerBase | None = None, block_size: int = 64,
        num_blocks: int | None = None, max_model_len: int | None = None, speculate: str | None = None,
        draft: str | os.PathLike[str] | PreTrainedModel | None = None, num_speculative_tokens: int = 4,
        device: str = "cpu", gpu_memory_utilization: float = 0.9, seed: int = 0, trust_remote_code: bool = False,
        clock: Callable[[], float] = time.perf_counter, tensor_parallel_size: int = 1, **unknown: Any,
    ) -> None:  # fmt: skip
        if unknown or tensor_parallel_size != 1:
            name = next(iter(unknown), "tensor_parallel_size")
            raise UnknownFieldError(f"LLM: {name} is not what this engine does; it runs one model in one process")
        counts = {
            "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "block_size": block_size,
            "num_speculative_tokens": num_speculative_tokens, "num_blocks": 1 if num_blocks is None else num_blocks,
        }  # fmt: skip
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"LLM: {name} is {value!r}; expected a whole number of 1 or more")
        if speculate not in (None, "ngram"):
            raise UserError(f"LLM: speculate is {speculate!r}; expected 'ngram', or draft=FOLDER for a draft model")
        source = load_source(model, dtype, device, kv_cache, trust_remote_code)
        tokenizer = tokenizer or source.tokenizer
        longest = source.context if max_model_len is None else max_model_len
        if not 1 <= longest <= source.context:
            raise UserError(f"LLM: max_model_len is {max_model_len!r}; the model's context has {source.context} tokens")
        runner = Runner(source.model)
        caches = [(runner, source.cache)]
        drafter: Drafter | None = PromptLookup(num_speculative_tokens) if speculate else None
        if draft is not None:
            guesser = load_source(draft, dtype, device, "auto", trust_remote_code)
            check_draft(guesser, source, longest)
            caches.append((Runner(guesser.model), guesser.cache))
            drafter = DraftModel(caches[1][0], num_speculative_tokens)
        self.block_bytes = block_size * sum(form.bytes_per_token(r.shapes, r.model.dtype) for r, form in caches)
        if num_blocks is None:
            each = -(-longest // block_size)
            num_blocks = cache_blocks(
                self.block_bytes, max_num_seqs * each, each, runner.device, gpu_memory_utilization
            )
        for each_runner, form in caches:
            each_runner.allocate(num_blocks, block_size, form)
        manager = BlockManager(num_blocks, block_size, prefix_caching=enable_prefix_caching)
        scheduler = Scheduler(manager, max_num_seqs, max_num_batched_tokens)
        ends = end_tokens(source.model, tokenizer)
        super().__init__(
            runner, scheduler, tokenizer, ends=ends, longest=longest, drafter=drafter, seed=seed, clock=clock
        )

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        priority: Sequence[int] | None = None, on_output: Callable[[RequestOutput], None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:  # fmt: skip
        """The outputs, in the prompts' order; a request that failed has `error` set and the others none of it.

        prompts    texts, lists of token ids, or {"prompt": ..} and {"prompt_token_ids": ..}; one, or a list
        on_output  called at each step that gave a request tokens; use_tqdm: taken and not needed, no bar is shown
        """
        steps = self._run(self._requests_of(prompts, sampling_params, priority, on_output))
        return sorted(chain.from_iterable(steps), key=lambda output: int(output.request_id))

    def chat(
        self, messages: list[Any], sampling_params: SamplingParams | None = None, **template: Any
    ) -> list[RequestOutput]:
        """`generate` behind a conversation, or each of a list of them, as the tokenizer's chat template writes it.

        template: further arguments of `apply_chat_template`. UserError where the tokenizer has none.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise UserError("this model's tokenizer has no chat template\nhint: generate() takes plain text")
        every = messages if messages and isinstance(messages[0], list) else [messages]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | template
        ids = [self.tokenizer.apply_chat_template(each, **options)["input_ids"] for each in every]  # type: ignore
        return self.generate(ids, sampling_params)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """The outputs as they grow, one for each request and step that gave it tokens; closing it cancels the rest."""
        fresh: list[RequestOutput] = []
        for ended in self._run(self._requests_of(prompts, sampling_params, None, fresh.append)):
            yield from fresh
            yield from (output for output in ended if output.error is not None)
            fresh.clear()

    def score(self, token_lists: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each list of T tokens the log-probability of each but the first, float32 [T - 1] on the CPU.

        Computed as generation does it: the same cache, the same chunks. UserError for tokens that do not fit.
        """
        results = [torch.zeros(max(len(tokens) - 1, 0)) for tokens in token_lists]

        def keep(index: int, start: int, logits_RV: Tensor) -> None:
            next_ = token_lists[index][start + 1 : start + 1 + len(logits_RV)]
            targets = torch.tensor(next_, dtype=torch.int64, device=logits_RV.device)
            losses = torch.nn.functional.cross_entropy(logits_RV[: len(next_)], targets, reduction="none")
            results[index][start : start + len(next_)] = -losses.cpu()

        self.logits(token_lists, keep)
        return results

    def logits(self, token_lists: Sequence[Sequence[int]], take: Callable[[int, int, Tensor], None]) -> None:
        """Call take(index of the list, position of the first row, logits float32 [rows, V]) for all tokens, in chunks.

        UserError for tokens that do not fit.
        """
        requests = [
            partial(self._add, tokens, None, on_logits=partial(take, index)) for index, tokens in enumerate(token_lists)
        ]
        for ended in self._run(requests):
            for output in ended:
                if output.error is not None:
                    raise UserError(output.error)

    def _run(self, requests: Iterable[Callable[[], str]]) -> Iterator[list[RequestOutput]]:
        """Add requests, and step until all of them have ended: at each step those that did. What stops it cancels."""
        ids: list[str] = []
        try:
            for add in requests:
                ids.append(add())
            left = set(ids)
            while left:
                ended = [output for output in self.step() if output.request_id in left]
                left -= {output.request_id for output in ended}
                yield ended
        finally:
            for request_id in ids:
                self.cancel(request_id)

    def _requests_of(self, prompts: Any, params: Any, priority: Any, on_output: Any) -> list[Callable[[], str]]:
        single = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        every: list[Any] = [prompts] if single else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(every)
        priority = priority or [0] * len(every)
        if not len(every) == len(params) == len(priority):
            raise UserError(f"{len(every)} prompts, {len(params)} sampling_params and {len(priority)} priorities")
        return [
            partial(self._add, prompt, each, priority=order, on_output=on_output)
            for prompt, each, order in zip(every, params, priority, strict=True)
        ]
