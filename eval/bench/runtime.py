"""The paged engine beside transformers on one thread: ratios of one run, baselines interleaved, raw samples kept.

    python eval/bench/runtime.py examples/tiny-llama --json out/runtime.json

Times are of the processor (other programs' share of it does not count) where one thread does all the work, and of
the clock beside them. Each row is the median of its repetitions:

    step      one decode step of 8 sequences over that of a bare forward of the model on a DynamicCache
    mixed     32 requests of 8 to 128 tokens in, 64 out: `generate` in padded batches of 8, `generate_batch`, over LLM
    prefix    32 requests that share 512 tokens: without the prefix cache over with it
    cache     one sequence at 4000 tokens: a decode step on a bfloat16 cache over one on int8; and the bytes of int8's
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from quantkit import LLM, SamplingParams, load

Sample = tuple[float, float]  # seconds of the processor, of the clock


def timed(run: Callable[[], Any]) -> Sample:
    busy, clock = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - busy, time.perf_counter() - clock


def interleaved(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[Sample]]:
    """Each in turn, `repeat` times, after one round that is not counted."""
    for run in runs.values():
        run()
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            samples[name].append(timed(run))
    return samples


def ratio(samples: dict[str, list[Sample]], over: str, under: str) -> dict[str, float]:
    """Medians of `over` divided by those of `under`."""
    busy, clock = (
        statistics.median(s[at] for s in samples[over]) / statistics.median(s[at] for s in samples[under])
        for at in (0, 1)
    )
    return {"processor": round(busy, 3), "clock": round(clock, 3)}


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def prompts(count: int, least: int, most: int, vocabulary: int) -> list[list[int]]:
    choose = random.Random(0)
    return [[choose.randrange(5, vocabulary) for _ in range(choose.randint(least, most))] for _ in range(count)]


def step(folder: str, repeat: int) -> dict[str, Any]:
    """A decode step of 8 sequences of 64 to 128 tokens."""
    model, llm = load(folder, dtype="float32"), LLM(folder, dtype="float32", enable_prefix_caching=False)
    every = prompts(8, 64, 64, llm.vocabulary)

    def bare() -> list[Sample]:
        cache, found = DynamicCache(config=model.config), []
        with torch.inference_mode():
            chosen = model(torch.tensor(every), cache=cache).logits[:, -1:].argmax(-1)
            for _ in range(64):
                began = time.process_time(), time.perf_counter()
                chosen = model(chosen, cache=cache).logits[:, -1:].argmax(-1)
                found.append((time.process_time() - began[0], time.perf_counter() - began[1]))
        return found

    def ours() -> list[Sample]:
        for prompt in every:
            llm.add(prompt, greedy(65))
        llm.step()
        found = []
        while llm.unfinished:
            found.append(timed(llm.step))
        return found

    samples: dict[str, list[Sample]] = {"engine": [], "bare forward": []}
    for _ in range(repeat):
        samples["bare forward"] += bare()
        samples["engine"] += ours()
    return {"engine over bare forward": ratio(samples, "engine", "bare forward"), "samples": samples}


def mixed(folder: str, repeat: int, new: int = 64) -> dict[str, Any]:
    """32 requests of 8 to 128 tokens."""
    model, llm = load(folder, dtype="float32"), LLM(folder, dtype="float32", enable_prefix_caching=False)
    paged = {"dtype": torch.float32, "attn_implementation": "paged|eager"}
    batched = AutoModelForCausalLM.from_pretrained(folder, **paged).eval()
    every = prompts(32, 8, 128, llm.vocabulary)
    found: dict[str, list[list[int]]] = {}

    def ours() -> None:
        found["LLM"] = [output.outputs[0].token_ids for output in llm.generate(every, greedy(new))]

    def padded() -> None:
        found["generate"] = []
        for start in range(0, len(every), 8):
            part = every[start : start + 8]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            found["generate"] += out[:, width:].tolist()

    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings.max_batch_tokens, settings.num_blocks = 512, 512  # type: ignore[attr-defined]

    def continuous() -> None:
        out = batched.generate_batch(every, generation_config=settings, progress_bar=False)
        found["generate_batch"] = [answer.generated_tokens for answer in out.values()]

    samples = interleaved({"LLM": ours, "generate": padded, "generate_batch": continuous}, repeat)
    tokens = new * len(every)
    return {
        "generate in padded batches of 8 over LLM": ratio(samples, "generate", "LLM"),
        "generate_batch over LLM": ratio(samples, "generate_batch", "LLM"),
        "tokens per second": {n: round(tokens / statistics.median(t for _, t in s)) for n, s in samples.items()},
        "same tokens": {name: sorted(out) == sorted(found["generate"]) for name, out in found.items()},
        "samples": samples,
    }


def prefix(folder: str, repeat: int) -> dict[str, Any]:
    """32 requests of 512 shared tokens and 8 of their own, 16 out; each time another shared text."""
    engines = {name: LLM(folder, dtype="float32", enable_prefix_caching=name == "with") for name in ("with", "without")}
    choose = random.Random(0)

    def run(llm: LLM) -> None:
        shared = [choose.randrange(5, llm.vocabulary) for _ in range(512)]
        llm.generate([shared + [choose.randrange(5, llm.vocabulary) for _ in range(8)] for _ in range(32)], greedy(16))

    samples = interleaved({name: lambda llm=llm: run(llm) for name, llm in engines.items()}, repeat)
    return {"without over with": ratio(samples, "without", "with"), "samples": samples}


def cache(repeat: int) -> dict[str, Any]:
    """A model of one layer, 32 query and 8 key/value heads of 128: its attention is what there is."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    )  # fmt: skip
    engines = {}
    for kind in ("auto", "int8"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        engines[kind] = LLM(model, kv_cache=kind, num_blocks=80, max_num_batched_tokens=1024)
    samples: dict[str, list[Sample]] = {"auto": [], "int8": []}
    prompt = [random.Random(0).randrange(64) for _ in range(4000)]
    for llm in engines.values():
        llm.add(prompt, greedy(16 * repeat + 8))
        while not llm.scheduler.running or llm.scheduler.running[0].computed < 4004:
            llm.step()
    for _ in range(16 * repeat):
        for kind, llm in engines.items():
            samples[kind].append(timed(llm.step))
    return {
        "bfloat16 over int8": ratio(samples, "auto", "int8"),
        "int8's bytes": round(engines["int8"].block_bytes / engines["auto"].block_bytes, 3),
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", help="one of step, mixed, prefix, cache")
    parser.add_argument("--json", type=Path, help="where raw samples go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: step(options.model, options.repeat),
        "mixed": lambda: mixed(options.model, options.repeat),
        "prefix": lambda: prefix(options.model, options.repeat),
        "cache": lambda: cache(options.repeat),
    }
    results = {}
    for name, run in parts.items():
        if options.only in (None, name):
            results[name] = run()
            for what, value in results[name].items():
                if what != "samples":
                    print(f"{name}: {what}: {value}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
