"""Our verdict on a quantization config is the one of vLLM 0.33's own config classes.

Needs the interpreter of an environment with vLLM's wheel; no GPU, and none of its kernels is run:

    python -m venv vllm && vllm/bin/pip install torch==2.13.0
    vllm/bin/pip install --no-deps vllm==0.33.0
    vllm/bin/pip install transformers==5.20.2 compressed-tensors==0.17.0
    vllm/bin/pip install psutil pyzmq cbor2 requests aiohttp openai openai-harmony pillow pybase64 cachetools msgspec
    vllm/bin/pip install py-cpuinfo ...  # further small requirements, as `import vllm` asks for them; not torchvision
    QUANTKIT_VLLM_CONFIG_PYTHON=vllm/bin/python pytest tests/interop/test_vllm_config.py
"""

import functools
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantkit.verification import preflight
from tests.tiny_folders import (
    CONFIGS,
    DENSE,
    FP8_TOKEN,
    INT8_TOKEN,
    KV,
    MODEL,
    MXFP4,
    MXFP8,
    NVFP4,
    SHAPES,
    STATIC,
    awq,
    ct,
    floating,
    fp8,
    gptq,
    integer,
    modelopt,
)

PYTHON = os.environ.get("QUANTKIT_VLLM_CONFIG_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(PYTHON is None, reason="QUANTKIT_VLLM_CONFIG_PYTHON does not name an interpreter with vLLM"),
]
# What a config alone cannot show: these compare it with the tensors.
OF_TENSORS = {"missing-packed", "untargeted", "head"}
PACKED = "pack-quantized"
Q, K, V = (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")


def group(**changes: Any) -> dict[str, Any]:
    """W4A16 with one thing changed in its group."""
    config = ct(integer(), PACKED)
    return config | {"config_groups": {"group_0": config["config_groups"]["group_0"] | changes}}


def file(algo: str, *absent: str) -> dict[str, Any]:
    """A hf_quant_config.json, as vLLM sees it."""
    inner = {"quant_algo": algo, "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    inner = {key: value for key, value in inner.items() if key not in absent}
    return {"quant_method": "modelopt", "quantization": inner}


CASES: dict[str, dict[str, Any]] = {
    **CONFIGS,
    **{f"int{bits} g32": ct(integer(bits, 32), PACKED) for bits in (1, 2, 5, 6, 7, 8, 9)},
    **{f"int{bits} asym": ct(integer(bits, 32, False), PACKED) for bits in (2, 3, 8)},
    **{f"w4 g{size}": ct(integer(4, size), PACKED) for size in (16, 32, 64, 256)},
    "no status": {k: v for k, v in CONFIGS["W4A16"].items() if k != "quantization_status"},
    "no format": ct(integer(), None),
    "mixed-precision alone": ct(integer(), "mixed-precision"),
    "group format wins": ct(integer(), PACKED, format="mixed-precision"),
    "w4 dense": ct(integer(), "dense"),
    "w4 int-quantized alone": ct(integer(), "int-quantized"),
    "w8 float-quantized": ct(integer(8, -1), "float-quantized", INT8_TOKEN),
    "w4a8 int-quantized": ct(integer(), "int-quantized", INT8_TOKEN),
    "w4a8 channel": ct(integer(4, -1), PACKED, INT8_TOKEN),
    "w2a8": ct(integer(2, 32), PACKED, INT8_TOKEN),
    "w4a4": ct(integer(), PACKED, INT8_TOKEN | {"num_bits": 4}),
    "w4a6": ct(integer(), PACKED, INT8_TOKEN | {"num_bits": 6}),
    "w4a8 asym inputs": ct(integer(), PACKED, INT8_TOKEN | {"symmetric": False}),
    "w4a8 static": ct(integer(), PACKED, STATIC),
    "w4a8-fp8 g64": ct(integer(4, 64), PACKED, FP8_TOKEN),
    "w4a8-fp8 channel": ct(integer(4, -1), PACKED, FP8_TOKEN),
    "w4a8-fp8 asym": ct(integer(symmetric=False), PACKED, FP8_TOKEN),
    "w8a8 asym weights": ct(integer(8, -1, False), "int-quantized", INT8_TOKEN),
    "w8a8 asym inputs": ct(integer(8, -1), "int-quantized", STATIC | {"symmetric": False}),
    "w8a8 groups": ct(integer(8, 128), "int-quantized", INT8_TOKEN),
    "w8a8 tensor": ct(STATIC, "int-quantized", STATIC),
    "w8a8 static out": group(weights=integer(8, -1), input_activations=STATIC, output_activations=STATIC),
    "w8a8 packed": ct(integer(8, -1), PACKED, INT8_TOKEN),
    "fp8 groups": ct(floating("group", group_size=128), "float-quantized", FP8_TOKEN),
    "fp8 asym": ct(floating("channel", symmetric=False), "float-quantized", FP8_TOKEN),
    "fp8 static token": ct(floating("channel"), "float-quantized", FP8_TOKEN | {"dynamic": False}),
    "fp8 static asym input": ct(
        floating("tensor"), "float-quantized", STATIC | {"type": "float", "symmetric": False}
    ),
    "fp8 dynamic weights": ct(floating("tensor", dynamic=True), "float-quantized", FP8_TOKEN),
    "fp8 int inputs": ct(floating("channel"), "float-quantized", INT8_TOKEN),
    "fp8 packed": ct(floating("channel"), PACKED),
    "fp8 weight-only tensor": ct(floating("tensor"), "naive-quantized"),
    "fp8 weight-only float-quantized": ct(floating("channel"), "float-quantized"),
    "fp8 block without structure": ct(floating("block"), "float-quantized", FP8_TOKEN),
    "fp8 block static": ct(
        floating("block", block_structure=[128, 128]), "float-quantized", STATIC | {"type": "float"}
    ),
    "fp8 block text": ct(floating("block", block_structure="128x128"), "float-quantized", FP8_TOKEN),
    "fp8 tensor with block": ct(floating("tensor", block_structure=[128, 128]), "float-quantized", FP8_TOKEN),
    "nvfp4 g32": ct(NVFP4 | {"group_size": 32}, "nvfp4-pack-quantized"),
    "nvfp4 asym": ct(NVFP4 | {"symmetric": False}, "nvfp4-pack-quantized"),
    "nvfp4 fp8 inputs": ct(NVFP4, "nvfp4-pack-quantized", FP8_TOKEN),
    "nvfp4 group": ct(NVFP4 | {"strategy": "group"}, "nvfp4-pack-quantized"),
    "mxfp4 fp8 inputs": ct(MXFP4, "mxfp4-pack-quantized", FP8_TOKEN),
    "mxfp4 g64": ct(MXFP4 | {"group_size": 64}, "mxfp4-pack-quantized"),
    "mxfp4 asym": ct(MXFP4 | {"symmetric": False}, "mxfp4-pack-quantized"),
    "mxfp8 without scale_dtype": ct(
        {k: v for k, v in MXFP8.items() if k != "scale_dtype"}, "mxfp8-quantized", MXFP8 | {"dynamic": True}
    ),
    "mxfp6": ct(MXFP4 | {"num_bits": 6}, "mxfp6-pack-quantized"),
    "mxfp6 with zp_dtype": ct(MXFP4 | {"num_bits": 6, "zp_dtype": "torch.uint8"}, "mxfp6-pack-quantized"),
    "marlin-24": ct(integer(), "marlin-24"),
    "unknown key": group(weights=integer() | {"zero_dtype": "int8"}),
    "unknown group key": group(kernel="x"),
    "unknown top key": ct(integer(), PACKED, more=1),
    "actorder weight": group(weights=integer() | {"actorder": "weight"}),
    "actorder static": group(weights=integer() | {"actorder": "static"}),
    "actorder false": group(weights=integer() | {"actorder": False}),
    "actorder group": group(weights=integer() | {"actorder": "group"}),
    "actorder dynamic": group(weights=integer() | {"actorder": "dynamic"}),
    "actorder true": group(weights=integer() | {"actorder": True}),
    "actorder group, channel": group(weights=integer(4, -1) | {"actorder": "group"}),
    "no weights": group(weights=None),
    "no targets": group(targets=None),
    "targets a class in lower case": group(targets=["linear"]),
    "channel with group_size": group(weights=integer(4, -1) | {"group_size": 64}),
    "channel with -1": group(weights=integer(4, -1) | {"group_size": -1}),
    "group_size -2": group(weights=integer(4, -1) | {"group_size": -2}),
    "group_size 0": group(weights={"num_bits": 4, "type": "int", "group_size": 0}),
    "strategy left out": group(weights={"num_bits": 4, "type": "int", "group_size": 128}),
    "strategy unknown": group(weights=integer() | {"strategy": "rows"}),
    "strategy in capitals": group(weights=integer() | {"strategy": "GROUP"}),
    "type unknown": group(weights=integer() | {"type": "nf4"}),
    "bits as text": group(weights=integer() | {"num_bits": "4"}),
    "bits missing": group(weights={k: v for k, v in integer().items() if k != "num_bits"}),
    "scale_dtype unknown": group(weights=integer() | {"scale_dtype": "torch.fp7"}),
    "scale_dtype short": group(weights=integer() | {"scale_dtype": "bfloat16"}),
    "dynamic local": group(weights=integer() | {"dynamic": "local"}),
    "observer": group(weights=integer() | {"observer": "mse", "observer_kwargs": {"a": 1}}),
    "ignore q": ct(integer(), PACKED, ignore=["lm_head", Q]),
    "ignore qk": ct(integer(), PACKED, ignore=["lm_head", Q, K]),
    "ignore qkv": ct(integer(), PACKED, ignore=["lm_head", Q, K, V]),
    "ignore qkv fused": ct(integer(), PACKED, ignore=["lm_head", "re:.*qkv_proj"]),
    "ignore by part of a name": ct(integer(), PACKED, ignore=["lm_head", "self_attn"]),
    "ignore by regex": ct(integer(), PACKED, ignore=["re:.*self_attn.*", "lm_head"]),
    "ignore gate by regex": ct(integer(), PACKED, ignore=["re:.*gate_proj"]),
    "ignore null": ct(integer(), PACKED, ignore=None),
    "sparsity empty": ct(integer(), PACKED, sparsity_config={}),
    "sparsity": ct(integer(), PACKED, sparsity_config={"format": "dense", "targets": ["Linear"]}),
    "kv int8": ct(integer(), PACKED, kv_cache_scheme=KV | {"type": "int"}),
    "kv 4 bits": ct(integer(), PACKED, kv_cache_scheme=KV | {"num_bits": 4}),
    "kv token": ct(integer(), PACKED, kv_cache_scheme=KV | {"strategy": "token", "dynamic": True}),
    "kv per head": ct(integer(), PACKED, kv_cache_scheme=KV | {"strategy": "attn_head"}),
    "kv asym": ct(integer(), PACKED, kv_cache_scheme=KV | {"symmetric": False}),
    "attention group": ct(
        integer(),
        PACKED,
        config_groups={
            **ct(integer(), PACKED)["config_groups"],
            "kv": {"targets": ["LlamaAttention"], "input_activations": KV},
        },
    ),
    "head targeted": group(targets=["Linear", "re:.*lm_head"]) | {"ignore": []},
    **{f"gptq {bits} bits": gptq(bits=bits) for bits in (2, 3, 8)},
    **{f"gptq g{size}": gptq(group_size=size) for size in (16, 32, 256, -1)},
    "gptq asym": gptq(sym=False),
    "gptq desc_act": gptq(desc_act=True),
    "gptq desc_act, channel": gptq(desc_act=True, group_size=-1),
    "gptq desc_act by rule": gptq(dynamic={r"+:.*up_proj": {"desc_act": True}}),
    "gptq skip rule": gptq(dynamic={r"-:.*qkv_proj": {}}),
    **{f"gptq without {key}": {k: v for k, v in gptq().items() if k != key}
       for key in ("bits", "group_size", "desc_act", "sym")},
    **{f"awq {bits} bits": awq(bits=bits) for bits in (3, 8)},
    "awq old keys": {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True},
    "awq g16": awq(group_size=16),
    "awq without zero_point": {k: v for k, v in awq().items() if k != "zero_point"},
    "awq skips q": awq(modules_to_not_convert=["q_proj"]),
    "awq skips attention": awq(modules_to_not_convert=["self_attn", "lm_head"]),
    "fp8 without activation_scheme": {k: v for k, v in fp8().items() if k != "activation_scheme"},
    "fp8 activation token": fp8(scheme="token"),
    "fp8 dynamic tensor": fp8(),
    "fp8 block static (fp8)": fp8([128, 128], "static"),
    "fp8 block of one": fp8([128]),
    "fp8 ignores q": fp8([128, 128], ignored_layers=[Q]),
    "fp8 ignores qkv": fp8([128, 128], ignored_layers=[Q, K, V]),
    "fp8 old name": {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]},
    **{f"modelopt {algo}": modelopt(algo) for algo in (
        "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W4A16_NVFP4", "MXFP8", "W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ",
        "INT8_SQ", "MIXED_PRECISION", "nvfp4")},
    "modelopt without algo": {"quant_method": "modelopt"},
    "modelopt mixed": modelopt("MIXED_PRECISION", quantized_layers={
        **{name: {"quant_algo": "FP8"} for name in SHAPES}}),
    "modelopt mixed in qkv": modelopt("MIXED_PRECISION", quantized_layers={
        Q: {"quant_algo": "FP8"}, K: {"quant_algo": "NVFP4"}, V: {"quant_algo": "FP8"}}),
    "modelopt ignore text": modelopt("FP8", ignore="lm_head"),
    **{f"file {algo}": file(algo) for algo in ("FP8", "NVFP4", "MXFP8")},
    "file NVFP4 without group_size": file("NVFP4", "group_size"),
    "file NVFP4 without kv": file("NVFP4", "kv_cache_quant_algo"),
    "file MXFP8 without excluded": file("MXFP8", "exclude_modules"),
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gguf": {"quant_method": "gguf"},
    "aqlm": {"quant_method": "aqlm"},
}  # fmt: skip


CHOICES: dict[str, list[Any]] = {
    "num_bits": [2, 3, 4, 6, 8],
    "type": ["int", "float"],
    "symmetric": [True, False],
    "strategy": ["tensor", "channel", "group", "block", "token", "tensor_group", None],
    "group_size": [None, -1, 16, 32, 64, 128, 256],
    "dynamic": [True, False, "local"],
    "block_structure": [None, [128, 128], [64, 64]],
    "scale_dtype": [None, "torch.uint8", "torch.float8_e4m3fn", "torch.int9"],
    "actorder": [None, True, False, "weight", "group"],
}
LAYOUTS = [PACKED, "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "dense", None]
IGNORES = [["re:.*q_proj"], ["re:.*(q|k|v)_proj"], ["re:.*_proj"], ["mlp"], ["re:model.layers.0.*"], [], None]
TARGETS = [["re:.*mlp.*"], ["Linear", "re:lm_head"], ["parallel"], ["Lin"], ["LINEAR"]]
OTHERS: dict[str, list[Any]] = {
    "bits": [2, 3, 4, 8, None],
    "group_size": [-1, 16, 32, 64, 128],
    "sym": [True, False, None],
    "desc_act": [True, False],
    "zero_point": [True, False],
    "dynamic": [None, {}, {"-:.*": {}}, {".*": {"bits": 8}}, {"+:.*mlp.*": {"group_size": 32, "desc_act": True}}],
    "modules_to_not_convert": [None, [], ["mlp"], ["k_proj"], ["q_proj", "k_proj", "v_proj"]],
    "activation_scheme": ["static", "dynamic", "none"],
    "weight_block_size": [None, [128, 128], [64, 128], [128]],
    "ignored_layers": [None, [], [Q], ["model.layers.0.self_attn.qkv_proj"], ["gate_proj"]],
    "quant_algo": ["FP8", "NVFP4", "MXFP8", "fp8_pb_wo", "INT4", None],
    "ignore": [[], ["*self_attn*"], ["model.layers.0*"], "lm_head"],
    "quant_method": ["gptq", "awq", "fp8", "GPTQ", "nf4"],
}


def mutants(count: int, seed: int) -> dict[str, dict[str, Any]]:
    """Good configs with one to three random changes."""
    rng = random.Random(seed)
    result = {}
    for i in range(count):
        kind = rng.choice(list(CONFIGS))
        config = json.loads(json.dumps(CONFIGS[kind]))
        for _ in range(rng.randint(1, 3)):
            if "config_groups" not in config:
                key = rng.choice([key for key in OTHERS if key in config or rng.random() < 0.1] or ["quant_method"])
                config[key] = rng.choice(OTHERS[key])
                continue
            part = config["config_groups"]["group_0"]
            numbers = [part[key] for key in ("weights", "input_activations") if part[key]]
            key = rng.choice([*CHOICES, "layout", "ignore", "inputs", "targets"])
            if key == "layout":
                part["format"] = rng.choice(LAYOUTS)
            elif key == "ignore":
                config["ignore"] = rng.choice(IGNORES)
            elif key == "inputs":
                part["input_activations"] = rng.choice(
                    [None, dict(INT8_TOKEN), dict(FP8_TOKEN), dict(STATIC), dict(NVFP4)]
                )
            elif key == "targets":
                part["targets"] = rng.choice(TARGETS)
            else:
                rng.choice(numbers)[key] = rng.choice(CHOICES[key])
        result[f"{kind} #{i}"] = config
    return result


MUTANTS = mutants(600, seed=7)


@functools.cache
def answers() -> dict[str, str]:
    """Case -> why vLLM refuses it, "" where it does not."""
    script = Path(__file__).with_name("vllm_accepts.py")
    assert PYTHON is not None
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    asked = json.dumps(CASES | MUTANTS)
    result = subprocess.run(
        [PYTHON, str(script)], input=asked, capture_output=True, text=True, env=environment, timeout=600
    )
    lines = [line[8:] for line in result.stdout.splitlines() if line.startswith("ACCEPTS ")]
    assert len(lines) == 1, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(lines[0])


def difference(config: dict[str, Any], theirs: str) -> str:
    """What vLLM says (theirs) and what we say where these differ, else ""."""
    found = preflight(config, SHAPES, SHAPES | DENSE, MODEL, "vllm")
    errors = [f for f in found if f.level == "error" and f.rule not in OF_TENSORS]
    return "" if bool(errors) == bool(theirs) else f"vLLM: {theirs or 'accepts'}; we: {errors or 'accept'}"


@pytest.mark.parametrize("name", CASES)
def test_same_verdict(name: str) -> None:
    assert not difference(CASES[name], answers()[name])


def test_same_verdict_on_random_changes() -> None:
    differing = {name: difference(config, answers()[name]) for name, config in MUTANTS.items()}
    assert not {name: (MUTANTS[name], text) for name, text in differing.items() if text}


@pytest.mark.parametrize("cases", [CASES, MUTANTS], ids=["cases", "mutants"])
def test_both_kinds_are_plenty(cases: dict[str, Any]) -> None:
    refused = sum(bool(answers()[name]) for name in cases)
    assert refused >= 60
    assert len(cases) - refused >= 60
