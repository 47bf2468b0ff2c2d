"""What a user does with LLM: outputs, faults of one request, cancelling, streaming, caches, folders, refusals."""

import copy
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from quantkit_kernels.cpu.linear import Way, machine, product_int8
from quantkit_kernels.cpu.weight import pack_cpu
from transformers import DynamicCache, LlamaModel, PreTrainedModel

import quantkit
from quantkit.cache_spec import CacheSpec
from quantkit.errors import UserError
from quantkit.grids.activations import KVRange
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import Request, RequestOutput, SamplingParams
from quantkit.runtime.engine.text import decode
from quantkit.runtime.load import load
from quantkit.runtime.quantized_cache import QuantizedCache
from quantkit.types import KVSpec
from tests.runtime.engine.equality import generated, prompts
from tests.tiny_models import tiny_model

BUNDLED = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"
# what this transformers calls the argument
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tiny(**options: Any) -> LLM:
    return LLM(tiny_model("llama"), **{"block_size": 8, "num_blocks": 24} | options)


def idle(llm: LLM) -> bool:
    """Whether the engine holds nothing."""
    llm.scheduler.check()
    return llm.scheduler.blocks.free == llm.scheduler.blocks.blocks and not llm.unfinished


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return LLM(BUNDLED, dtype="float32", num_blocks=64)


def test_names_are_exported() -> None:
    assert quantkit.LLM is LLM
    assert quantkit.SamplingParams is SamplingParams


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5, 96], GREEDY, "token id 96 of the prompt .* 0 to 95"),
        ([5, -1], GREEDY, "token id -1"),
        ([5, "6"], GREEDY, "token id '6'"),
        ([5, None], GREEDY, "token id None"),
        ([], GREEDY, "no tokens"),
        ([5] * 64, GREEDY, "64 tokens.*context has 64"),
        ([5] * 40, SamplingParams(max_tokens=20), "60 tokens need 8 blocks of 8; the cache has 6"),
        ([5, 6], SamplingParams(stop=["x", ""]), "a stop string is empty"),
        ([5, 6], SamplingParams(stop="x"), "tokenizer"),
        ([5, 6], SamplingParams(max_tokens=8, stop_token_ids=[500], min_tokens=2), "IndexError|500"),
    ],
)
def test_a_fault_fails_its_request_alone(prompt: list[Any], params: SamplingParams, message: str) -> None:
    llm = tiny(num_blocks=6)
    good = [7, 8, 9]
    outputs = llm.generate([good, prompt, good], [GREEDY, params, GREEDY])
    assert outputs[1].error is not None
    assert re.search(message, outputs[1].error), outputs[1].error
    assert outputs[1].outputs[0].finish_reason == "error"
    wanted = generated(tiny_model("llama"), good, 8)
    assert outputs[0].outputs[0].token_ids[: len(wanted)] == wanted
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids
    assert idle(llm)


def test_a_callback_that_raises_fails_its_request_alone() -> None:
    llm = tiny()

    def fail(output: RequestOutput) -> None:
        if len(output.outputs[0].token_ids) == 3:
            raise KeyError("boom")

    first = llm.add([5, 6, 7], GREEDY, on_output=fail)
    second = llm.add([8, 9], GREEDY)
    done = {}
    while llm.unfinished:
        done |= {output.request_id: output for output in llm.step()}
    assert done[first].error == "KeyError: 'boom'"
    assert len(done[first].outputs[0].token_ids) == 3
    assert (done[second].error, len(done[second].outputs[0].token_ids)) == (None, 8)
    assert idle(llm)


def test_cancelling_frees_at_once() -> None:
    llm = tiny(max_num_seqs=1)
    running, waiting = llm.add([5] * 20, GREEDY), llm.add([6] * 20, GREEDY)
    llm.step()
    assert llm.scheduler.blocks.free < 24
    assert llm.cancel(running)
    assert llm.scheduler.blocks.free == 24
    assert llm.cancel(waiting)
    assert not llm.cancel(waiting)
    assert not llm.cancel("unknown")
    assert llm.step() == []
    assert idle(llm)


def test_callbacks_may_cancel_and_add() -> None:
    """Themselves, others of the same step, and after the end; what they add runs."""
    llm = tiny()
    ids: list[str] = []
    added: list[str] = []

    def act(output: RequestOutput) -> None:
        if len(output.outputs[0].token_ids) == 2:
            llm.cancel(ids[0])
            llm.cancel(ids[2])
            added.append(llm.add([9], GREEDY))
        if output.finished:
            assert not llm.cancel(output.request_id)

    ids += [llm.add([5 + i], GREEDY, on_output=act if i == 0 else None) for i in range(4)]
    done = {}
    while llm.unfinished:
        done |= {output.request_id: output for output in llm.step()}
    assert sorted(done) == sorted([ids[1], ids[3], *added])
    assert all(output.error is None for output in done.values())
    assert idle(llm)


def test_an_exception_of_a_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny()
    llm.generate([[5] * 20], GREEDY)
    run = llm.runner.run
    monkeypatch.setattr(llm.runner, "run", lambda pieces: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[7] * 20, [8] * 20], GREEDY)
    monkeypatch.setattr(llm.runner, "run", run)
    assert idle(llm)
    assert llm.generate([7] * 20, GREEDY)[0].num_cached_tokens == 0  # what was not computed is not believed


def test_stream() -> None:
    llm = tiny()
    wanted = llm.generate([[5, 6, 7], [8, 9]], GREEDY)
    seen: dict[str, list[int]] = {}
    for output in llm.stream([[5, 6, 7], [8, 9]], GREEDY):
        tokens = output.outputs[0].token_ids
        assert tokens[: len(seen.get(output.request_id, []))] == seen.get(output.request_id, [])
        assert len(tokens) == len(seen.get(output.request_id, [])) + 1
        seen[output.request_id] = tokens
        assert output.finished == (len(tokens) == 8)
    assert list(seen.values()) == [output.outputs[0].token_ids for output in wanted]
    stream = llm.stream([5, 6], GREEDY)
    next(stream)
    stream.close()
    assert idle(llm)
    assert next(llm.stream([5, 500], GREEDY)).error is not None


def test_text_and_stop_strings(bundled: LLM) -> None:
    plain = bundled.generate("def __init__(self", SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    assert bundled.tokenizer is not None
    assert plain.finish_reason == "length"
    word = plain.text[8:14]
    at = plain.text.index(word)
    for included in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=24, stop=[word, "no such"], include_stop_str_in_output=included
        )
        cut = bundled.generate("def __init__(self", params)[0].outputs[0]
        assert cut.text == plain.text[: at + (len(word) if included else 0)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", word)
        assert len(cut.token_ids) < 24
    pieces = [
        output.outputs[0].text
        for output in bundled.stream("def __init__(self", SamplingParams(temperature=0, max_tokens=24))
    ]
    assert pieces[-1] == plain.text
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(pieces))


def test_half_a_character_waits_for_its_other_half(bundled: LLM) -> None:
    assert bundled.tokenizer is not None
    text = "x = '€ü漢'"
    tokens = bundled.tokenizer(text)["input_ids"]
    request = Request("1", tokens[:1], 1, 99, SamplingParams(), decoded=(0, 1))  # type: ignore[index]
    grown = ""
    for token in tokens[1:]:  # type: ignore[index]
        request.tokens.append(token)
        decode(request, bundled.tokenizer)
        assert "\ufffd" not in request.text
        assert request.text.startswith(grown)
        grown = request.text
    assert text.endswith(grown)
    assert "漢" in grown


def test_stop_tokens_and_eos() -> None:
    llm = tiny()
    tokens = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    stop = tokens[3]
    first = tokens.index(stop)
    output = llm.generate(
        [5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    )
    assert output[0].outputs[0].token_ids == tokens[: first + 1]
    assert (output[0].outputs[0].finish_reason, output[0].outputs[0].stop_reason) == ("stop", stop)
    llm.ends = {stop}
    output = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8))
    assert output[0].outputs[0].token_ids == tokens[: first + 1]
    assert (output[0].outputs[0].finish_reason, output[0].outputs[0].stop_reason) == ("stop", None)
    later = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, min_tokens=7))[0].outputs[0].token_ids
    assert len(later) >= 7
    assert stop not in later[:6]


def test_prompts_of_every_kind(bundled: LLM) -> None:
    assert bundled.tokenizer is not None
    ids: list[int] = bundled.tokenizer("def f(")["input_ids"]  # type: ignore[assignment]
    every: list[Any] = ["def f(", ids, {"prompt": "def f("}, {"prompt_token_ids": ids}]
    outputs = bundled.generate(every, GREEDY)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert bundled.generate(ids, GREEDY)[0].prompt_token_ids == ids
    assert bundled.generate(np.array(ids), GREEDY)[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids  # type: ignore[arg-type]
    assert bundled.generate([], GREEDY) == []
    with pytest.raises(UserError, match="multi_modal_data"):
        bundled.generate({"prompt": "x", "multi_modal_data": {}}, GREEDY)
    with pytest.raises(UserError, match="2 prompts, 1 sampling_params"):
        bundled.generate(["x", "y"], [GREEDY])


def test_prefixes_are_found_again() -> None:
    llm = tiny()
    shared = list(range(10, 30))
    assert llm.generate([*shared, 5], GREEDY)[0].num_cached_tokens == 0
    again = llm.generate([*shared, 6], GREEDY)[0]
    assert again.num_cached_tokens == 16
    assert again.outputs[0].token_ids == tiny().generate([*shared, 6], GREEDY)[0].outputs[0].token_ids
    off = tiny(enable_prefix_caching=False)
    off.generate([*shared, 5], GREEDY)
    assert off.generate([*shared, 6], GREEDY)[0].num_cached_tokens == 0


def test_priority() -> None:
    llm = tiny(max_num_seqs=1)
    order: list[str] = []
    llm.generate([[5], [6], [7]], GREEDY, priority=[0, 2, -1], on_output=lambda o: order.append(o.request_id))
    assert [order[0], order[8], order[16]] == ["3", "1", "2"]


INT8, INT4 = KVSpec(8, "int", "token"), KVSpec(4, "int", "token")
CACHES: dict[str, tuple[Any, KVSpec]] = {
    "int8": ("int8", INT8),
    "int4": ("int4", INT4),
    "fp8": ("fp8", KVSpec(8, "float", "token")),
    "groups": (KVSpec(4, "int", "token", group_size=4), KVSpec(4, "int", "token", group_size=4)),
    "zero points": (KVSpec(8, "int", "token", False), KVSpec(8, "int", "token", False)),
}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("cache", CACHES)
def test_quantized_caches_equal_the_simulation(name: str, cache: str) -> None:
    """Log-probabilities through pages and chunks against transformers on a cache that rounds: 1e-4 in float32.

    Every head size has a way of its own: with a kernel (gemma3's and gpt_neox's), and without.
    """
    model, (wanted_format, spec) = tiny_model(name), CACHES[cache]
    tokens = [torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(2)]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), **{CACHE: QuantizedCache(spec, config=model.config)}).logits
        plain = model(torch.tensor(tokens), **{CACHE: DynamicCache(config=model.config)}).logits
    targets = torch.tensor(tokens)[:, 1:, None]
    wanted, without = (each[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0] for each in (logits, plain))
    assert not torch.allclose(wanted, without, atol=1e-3)
    for options in ({}, {"max_num_batched_tokens": 5}):
        got = torch.stack(
            LLM(tiny_model(name), kv_cache=wanted_format, block_size=8, num_blocks=16, **options).score(tokens)
        )
        assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()


@pytest.mark.parametrize(
    "spec", [KVSpec(8, "float"), KVSpec(8, "float", "head"), KVSpec(8, "int", "token", channels=True)], ids=str
)
def test_calibrated_caches_equal_the_simulation(spec: KVSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded by the kernel, which folds what was calibrated into queries and outputs, and by the plain path."""
    model = tiny_model("gemma3")
    generator = torch.Generator().manual_seed(0)
    shape = {"tensor": (), "head": (2,), "token": (2, 2, 16)}[spec.per]
    pairs = [KVRange(*(torch.rand(shape, generator=generator) * 0.02 + 0.01 for _ in "kv")) for _ in range(2)]
    if spec.channels:
        pairs = [KVRange(*(x * 50 for x in pair if x is not None)) for pair in pairs]
    ranges = dict(enumerate(pairs))
    tokens = torch.randint(3, 96, (20,), generator=generator).tolist()
    cache = QuantizedCache(CacheSpec(spec, spec), ranges, config=model.config)
    with torch.no_grad():
        shares = model(torch.tensor([tokens]), **{CACHE: cache}).logits[0, :-1].log_softmax(-1)
    wanted = shares.gather(-1, torch.tensor(tokens)[1:, None])[:, 0]
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr("quantkit.runtime.engine.attention.cpu_paged_attention", lambda *a, **k: None)
        ours = tiny_model("gemma3")
        vars(ours)["quantkit_cache"] = CacheSpec(spec, spec), ranges
        got = LLM(ours, block_size=8, num_blocks=8, max_num_batched_tokens=1).score([tokens])[0]
        assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()


def test_others_in_the_step_change_float_noise_only() -> None:
    """A token's scales are its own: alone, or beside others."""
    every = prompts(5, 96)
    llm = tiny(kv_cache="int8", enable_prefix_caching=False)
    for alone, among in zip((llm.score([each])[0] for each in every), llm.score(every), strict=True):
        assert torch.allclose(alone, among, atol=1e-4)


def test_keys_and_values_each_of_their_own() -> None:
    tokens = [torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0)).tolist()]
    both = tiny(kv_cache={"keys": "int8", "values": "int4"})
    assert both.runner.cache is not None
    keys, values = both.runner.cache.layers[0]
    assert (keys.spec, values.spec) == (INT8, INT4)
    mixed, eight, four = (tiny(kv_cache=each).score(tokens)[0] for each in ("keys=int8,values=int4", "int8", "int4"))
    plain = tiny().score(tokens)[0]
    assert (eight - plain).abs().max() < (mixed - plain).abs().max() < 2 * (four - plain).abs().max()
    with pytest.raises(UserError, match="did you mean `keys`"):
        tiny(kv_cache={"key": "int8"})


SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": {"bits": 4, "group_size": 16, "algorithm": "rtn"}},
    "W8A8": {"scheme": "W8A8", "weights": {"algorithm": "rtn"}},
    "FP8": {"scheme": "FP8_DYNAMIC", "weights": {"algorithm": "rtn"}},
    "FP8 with an FP8 cache": {
        "scheme": "FP8_DYNAMIC",
        "kv_cache": "fp8",
        "calibration": {},
        "weights": {"algorithm": "rtn"},
    },
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_folders_equal_generate(tmp_path: Path, scheme: str) -> None:
    """Of packed linears, and with the checkpoint's own cache and its scales."""
    tiny_model("llama").save_pretrained(tmp_path / "source")
    ids = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    calibration = {"calibration": ids} if "calibration" in SCHEMES[scheme] else {}
    quantkit.quantize(tmp_path / "source", SCHEMES[scheme], tmp_path / "out", progress=False, **calibration)
    transformers.logging.set_verbosity_error()
    model, every = load(tmp_path / "out", dtype="float32"), prompts(6, 96)
    llm = LLM(tmp_path / "out", dtype="float32", block_size=8, num_blocks=14, max_num_batched_tokens=9)
    assert llm.runner.cache is not None
    keys = llm.runner.cache.layers[1][0]
    assert (keys.spec == KVSpec(8, "float")) == ("cache" in scheme)
    outputs = llm.generate(every, SamplingParams(temperature=0, max_tokens=20))
    for prompt, output in zip(every, outputs, strict=True):
        assert output.outputs[0].token_ids == generated(model, prompt)
    assert idle(llm)


def config_of(**changes: Any) -> dict[str, Any]:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 1}
    return base | {"num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32} | changes


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder-decoder",
        ),
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, "multi-head latent attention"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "state space"),
        ({"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}, "linear_attention"),
        (
            {"model_type": "recurrent_gemma", "architectures": ["RecurrentGemmaForCausalLM"]},
            "state space|full and sliding",
        ),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"], "vision_config": {}}, "vision"),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "AttentionInterface"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_refused_before_weights_are_read(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    """There are no weights in these folders."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"block_size": "8"}, "block_size is '8'"),
        ({"max_model_len": 65}, "max_model_len is 65; the model's context has 64"),
        ({"speculate": "eagle"}, "speculate is 'eagle'"),
        ({"kv_cache": "int7b"}, "int7b"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "hot"}, {"temperature": None}, {"top_k": 1.5}, {"max_tokens": "5"}, {"seed": "x"},
        {"seed": 2**64}, {"stop": 5}, {"stop": [5]}, {"stop_token_ids": 5}, {"stop_token_ids": ["a"]}, {"n": 2},
        {"ignore_eos": "no"}, {"best_of": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_sampling_params_do_not_take_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"SamplingParams.*{next(iter(wrong))}"):
        SamplingParams(**wrong)


def test_a_field_set_later_is_not_ignored() -> None:
    params = SamplingParams(seed=3)
    with pytest.raises(AttributeError, match="best_of"):
        params.best_of = 2  # type: ignore[attr-defined]
    assert copy.deepcopy(params) == params == SamplingParams(seed=np.int64(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[1.5, 2], [None], [[5, 6], 7]], ids=str)
def test_what_is_no_prompt_is_refused_and_leaves_nothing(prompts: Any) -> None:
    llm = tiny()
    with pytest.raises(UserError, match="expected a text or a list of token ids"):
        llm.generate(prompts, GREEDY)
    assert idle(llm)


def test_an_encoder() -> None:
    config = transformers.BertConfig(vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UserError, match="is an encoder"):
        LLM(transformers.AutoModelForCausalLM.from_config(config), num_blocks=8)


def test_a_draft_of_another_vocabulary(bundled: LLM) -> None:
    with pytest.raises(UserError, match=r"96 tokens.*4096"):
        LLM(BUNDLED, dtype="float32", num_blocks=8, draft=tiny_model("llama"))


def test_a_model_whose_attention_stays_its_own() -> None:
    with pytest.raises(UserError, match="AttentionInterface"):
        LLM(tiny_model("falcon"))


def test_the_model_itself_says_it_is_the_engine_s() -> None:
    model: PreTrainedModel = tiny_model("llama")
    LLM(model, num_blocks=4)
    with pytest.raises(UserError, match="paged engine"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("option", [{"tensor_parallel_size": 2}, {"quantisation": "awq"}])
def test_what_the_engine_does_not_do_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(option))):
        tiny(**option)


def test_chat(bundled: LLM) -> None:
    talk = [{"role": "user", "content": "def f("}]
    assert bundled.tokenizer is not None
    with pytest.raises(UserError, match="no chat template"):
        bundled.chat(talk)
    bundled.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}{% endfor %}"
    try:
        found = bundled.chat([talk, talk], GREEDY)
    finally:
        bundled.tokenizer.chat_template = None
    assert len(found) == 2
    assert found[0].outputs[0].token_ids == bundled.generate("<def f(", GREEDY)[0].outputs[0].token_ids


SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def other_model(config: transformers.PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.dim() > 1 else 1))
    return model


@pytest.mark.parametrize(
    "config",
    [
        transformers.DiffLlamaConfig(**SMALL),  # attends twice in a layer
        transformers.DogeConfig(**SMALL, keep_window_size=8),  # masks by what the keys say
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_model_that_would_compute_something_else_is_refused(config: transformers.PretrainedConfig) -> None:
    with pytest.raises(UserError, match="its logits differ from its own"):
        LLM(other_model(config), num_blocks=8)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GptOssConfig(**SMALL, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),  # sinks
        transformers.Gemma2Config(**SMALL, sliding_window=8, attn_logit_softcapping=2.0),
        transformers.Cohere2Config(**SMALL, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_sinks_softcap_and_windows(config: transformers.PretrainedConfig) -> None:
    config._attn_implementation = "eager"
    model = other_model(config)
    tokens = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 23)]
    got = LLM(other_model(config), block_size=8, num_blocks=20, max_num_batched_tokens=13).score(tokens)
    for each, ours in zip(tokens, got, strict=True):
        with torch.no_grad():
            shares = model(torch.tensor([each]), use_cache=False).logits[0, :-1].log_softmax(-1)
        assert torch.allclose(ours, shares.gather(-1, torch.tensor(each)[1:, None])[:, 0], atol=1e-4)


def test_int8_products_are_the_same_to_the_bit_whatever_computes_them() -> None:
    """So that a W8A8 model's tokens do not depend on who else is in the step: integers are summed, and rounded once."""
    generator = torch.Generator().manual_seed(0)
    for K in (64, 256, 320):
        codes = torch.randint(0, 256, (96, K), dtype=torch.uint8, generator=generator)
        weight = pack_cpu(codes, torch.rand(96, 1, generator=generator), format="int8", group_size=-1)
        x_MK = torch.randint(-127, 128, (9, K), dtype=torch.int8, generator=generator)
        scale_M = torch.rand(9, generator=generator)
        wanted = (x_MK.int() @ (codes.int() - 128).T).float() * weight.scale[:, 0] * scale_M[:, None]
        ways: list[Way] = [*(["gemv_int8"] if machine().compiled else []), *(["qlinear"] if machine().vnni else [])]
        for way in ways:
            assert torch.equal(product_int8(x_MK, scale_M, weight, way), wanted)
