"""The paged engine beside transformers on one thread: ratios of one run, baselines interleaved, raw samples kept.

    python eval/bench/runtime.py examples/tiny-llama --json out/runtime.json

Times are of the processor (other programs' share of it does not count) where one thread does all the work, and of
the clock beside them. Each row is the median of its repetitions:

    step      one decode step of 8 sequences over that of a bare forward of the model on a DynamicCache
    mixed     32 requests of 8 to 128 tokens in, 64 out: `generate` in padded batches of 8, `generate_batch`, over LLM
    prefix    32 requests that share 512 tokens: without the prefix cache over with it
    packed    a random Llama (--layers 24: a billion weights), one sequence and eight: `generate` of its bfloat16
              original over LLM of its W4A16 copy in groups of 128; with --llamacpp, LLM over llama-bench of its Q4_0
    served    MODEL and its quantized copy (--quantized), one sequence and eight, 128 tokens in and 64 out: `generate`
              of MODEL over LLM of the copy; tokens a second of prefill and decode, the best of the repetitions, and
              with --llamacpp those of llama-bench on its files
    cache     one sequence at 4000 tokens: a decode step on a bfloat16 cache over one on int8; and the bytes of int8's
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from quantkit_eval.bench import engine_run
from quantkit_eval.bench.llama_bench import gguf_files, llama_bench, measure
from quantkit_eval.bench.machine import model_cost
from quantkit_eval.bench.options import scenarios
from quantkit_eval.bench.workload import workload
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from quantkit import LLM, SamplingParams, load, quantize

Sample = tuple[float, float]  # seconds of the processor, of the clock


def timed(run: Callable[[], Any]) -> Sample:
    busy, clock = time.process_time(), time.perf_counter()
    run()
    return round(time.process_time() - busy, 5), round(time.perf_counter() - clock, 5)


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

            def once() -> None:
                nonlocal chosen
                chosen = model(chosen, cache=cache).logits[:, -1:].argmax(-1)

            found += [timed(once) for _ in range(64)]
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
    eight = LLM(folder, dtype="float32", enable_prefix_caching=False, max_num_seqs=8)
    paged = {"dtype": torch.float32, "attn_implementation": "paged|eager"}
    batched = AutoModelForCausalLM.from_pretrained(folder, **paged).eval()
    every = prompts(32, 8, 128, llm.vocabulary)
    found: dict[str, list[list[int]]] = {}

    def ours(name: str, llm: LLM) -> None:
        found[name] = [output.outputs[0].token_ids for output in llm.generate(every, greedy(new))]

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

    runs = {"LLM": lambda: ours("LLM", llm), "LLM, 8 at a time": lambda: ours("LLM, 8 at a time", eight)}
    samples = interleaved(runs | {"generate": padded, "generate_batch": continuous}, repeat)
    tokens = new * len(every)
    return {
        "generate in padded batches of 8 over LLM": ratio(samples, "generate", "LLM"),
        "the same over LLM with 8 at a time": ratio(samples, "generate", "LLM, 8 at a time"),
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


def random_llama(place: Path, layers: int, tokenizer: str) -> Path:
    """A folder: blocks of 43 million weights, in bfloat16, with a tokenizer's files and its vocabulary."""
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)), hidden_size=2048, intermediate_size=5632,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(place)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
    return place


def packed(tokenizer: str, repeat: int, layers: int, llamacpp: Path | None, new: int = 16) -> dict[str, Any]:
    """Prompts of 32 tokens, 16 out."""
    with tempfile.TemporaryDirectory() as home:
        original = random_llama(Path(home) / "original", layers, tokenizer)
        quantize(original, {"scheme": "W4A16"}, Path(home) / "w4a16", progress=False)
        model, llm = load(original), LLM(Path(home) / "w4a16", enable_prefix_caching=False, max_model_len=64)
        found: dict[str, Any] = {"samples": {}}
        for size in (1, 8):
            every = prompts(size, 32, 32, llm.vocabulary)

            def theirs(every: list[list[int]] = every) -> None:
                ids = torch.tensor(every)
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
                    pad_token_id=0,
                )  # fmt: skip

            def ours(every: list[list[int]] = every) -> None:
                llm.generate(every, greedy(new))

            samples = interleaved({"bfloat16 generate": theirs, "W4A16 LLM": ours}, repeat)
            found[f"batch {size}: generate over LLM"] = ratio(samples, "bfloat16 generate", "W4A16 LLM")
            found["samples"][f"batch {size}"] = samples
        if llamacpp is not None:
            lengths = scenarios(64, prefill=32, decode=new)
            cost, single = model_cost(llm), workload(lengths[0], list(range(5, 2000)))
            steps = [step for step in engine_run.run(llm, single, cost).steps if not step.prompt_tokens]
            speed = len(steps) / sum(step.seconds for step in steps)
            rows = llama_bench(llamacpp, str(original), lengths)
            found["decode, LLM over llama-bench"] = {
                row.name: round(speed / row.decode, 3) for row in rows if row.decode is not None
            }
            found["samples"]["decode tokens per second"] = {"LLM": speed} | {row.name: row.decode for row in rows}
        return found


def served(
    original: str, copy: Path, repeat: int, llamacpp: Path | None, read: int = 128, new: int = 64
) -> dict[str, Any]:
    """A model that people run. All take turns; llama.cpp's files run one sequence alone."""
    engines = {
        name: LLM(folder, enable_prefix_caching=False, max_model_len=read + new, max_num_batched_tokens=8 * read)
        for name, folder in (("original, LLM", original), ("quantized, LLM", copy))
    }
    model, found = load(original), dict[str, Any](samples={})
    with tempfile.TemporaryDirectory() as place:
        files = [] if llamacpp is None else gguf_files(llamacpp, original, Path(place))
        for size in (1, 8):
            speeds: dict[str, list[tuple[float, float]]] = {}
            whole: dict[str, list[Sample]] = {}
            ids = torch.tensor(prompts(size, read, read, engines["original, LLM"].vocabulary))

            def once(tokens: int, ids: Tensor = ids) -> Sample:
                options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                return timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))  # type: ignore

            for llm in engines.values():  # warms up
                prefill_and_decode(llm, ids.tolist(), 4)
            once(4)
            for _ in range(repeat):
                for name, llm in engines.items():
                    first, steps = prefill_and_decode(llm, ids.tolist(), new)
                    speeds.setdefault(name, []).append((size * read / first[0], size * (new - 1) / steps[0]))
                    whole.setdefault(name, []).append((first[0] + steps[0], first[1] + steps[1]))
                whole.setdefault("original, generate", []).append(once(new))
                for file in files if size == 1 else []:
                    name, *times = llama_seconds(llamacpp, file, read, new)  # type: ignore[arg-type]
                    speeds.setdefault(f"llama-bench, {name}", []).append((read / times[0], new / times[1]))
            found[f"batch {size}: tokens per second, prefill and decode"] = {
                name: [round(max(each), 1) for each in zip(*samples, strict=True)] for name, samples in speeds.items()
            }
            found[f"batch {size}: generate over quantized LLM"] = ratio(whole, "original, generate", "quantized, LLM")
            found["samples"][f"batch {size}"] = {"tokens per second": speeds, "seconds": whole}
    return found


def llama_seconds(folder: Path, file: Path, read: int, new: int) -> tuple[str, float, float]:
    """A file's name, and the processor's seconds of one prompt and of one output: three of them less one, halved."""

    def busy(prompt: int, output: int, repetitions: int) -> tuple[str, float]:
        before = os.times()
        name = measure(folder, file, prompt, output, repetitions).name
        after = os.times()
        return name, after.children_user + after.children_system - before.children_user - before.children_system

    (name, three), (_, one) = busy(read, 0, 3), busy(read, 0, 1)
    return name, (three - one) / 2, (busy(0, new, 3)[1] - busy(0, new, 1)[1]) / 2


def prefill_and_decode(llm: LLM, every: list[list[int]], new: int) -> tuple[Sample, Sample]:
    """The time of the step that computes all prompts, and of those that follow it."""
    for prompt in every:
        llm.add(prompt, greedy(new))
    first, steps = timed(llm.step), list[Sample]()
    while llm.unfinished:
        steps.append(timed(llm.step))
    return first, (sum(busy for busy, _ in steps), sum(clock for _, clock in steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", help="one of step, mixed, prefix, packed, served, cache")
    parser.add_argument("--layers", type=int, default=24, help="of the random Llama of packed")
    parser.add_argument("--llamacpp", type=Path, help="folder of llama.cpp's tools, for packed and served")
    parser.add_argument("--quantized", type=Path, help="a quantized copy of the model: served runs where it is given")
    parser.add_argument("--json", type=Path, help="where raw samples go; parts that are there already stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: step(options.model, options.repeat),
        "mixed": lambda: mixed(options.model, options.repeat),
        "prefix": lambda: prefix(options.model, options.repeat),
        "packed": lambda: packed(options.model, options.repeat, options.layers, options.llamacpp),
        "cache": lambda: cache(options.repeat),
    }
    if options.quantized is not None:
        parts["served"] = lambda: served(options.model, options.quantized, options.repeat, options.llamacpp)
    results = {}
    for name, run in parts.items():
        if options.only in (None, name):
            results[name] = run()
            for what, value in results[name].items():
                if what != "samples":
                    print(f"{name}: {what}: {value}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(before | results) + "\n")


if __name__ == "__main__":
    main()
