"""verify: every good folder loads where it should, and each way of being broken is named by its rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.report.console import (
    render_verdict,
)
from quantkit.verification import ENGINES, file_hashes, preflight, verify_folder, verify_layout
from quantkit.verification.config.other_methods import make_subject
from quantkit.verification.engines.vllm_kernels import kernel_table
from quantkit.verification.findings import Verdict
from tests.tiny_folders import CONFIGS, DENSE, FP8_TOKEN, KV, MODEL, SHAPES, Folder, ct, floating, integer

Q0, K0, O0, UP0, DOWN0 = (f"model.layers.0.{n}" for n in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))  # fmt: skip
SERVERS = {"vllm", "sglang", "transformers"}
LOADS: dict[str, set[str]] = {
    "W4A16": SERVERS | {"llama.cpp"},
    "W4A16 asym": SERVERS | {"llama.cpp"},
    "W3A16": {"vllm", "transformers", "llama.cpp"},
    "W8A16": SERVERS,
    "W8A8": SERVERS | {"llama.cpp"},
    "W8A8 static": SERVERS | {"llama.cpp"},
    "W4A8": {"vllm", "transformers", "llama.cpp"},
    "W4A8-FP8": {"vllm", "transformers", "llama.cpp"},
    "FP8": SERVERS,
    "FP8 dynamic": SERVERS | {"llama.cpp", "tensorrt-llm"},
    "FP8 block": set(ENGINES),
    "FP8 weight-only": SERVERS | {"llama.cpp"},
    "NVFP4": set(ENGINES),
    "NVFP4A16": set(ENGINES),
    "MXFP4": {"vllm", "transformers"},
    "MXFP4A16": {"vllm", "transformers", "tensorrt-llm"},
    "MXFP8": {"vllm", "transformers"},
    "kv": SERVERS | {"llama.cpp"},
    "gptq": SERVERS | {"llama.cpp"},
    "gptq v2": SERVERS | {"llama.cpp"},
    "gptq 8": SERVERS | {"llama.cpp"},
    "awq": SERVERS,
    "awq sym": SERVERS,
    "fp8": {"vllm", "sglang"},
    "fp8 block": set(ENGINES),
    "modelopt fp8": {"vllm", "sglang", "tensorrt-llm"},
    "modelopt nvfp4": {"vllm", "sglang", "llama.cpp", "tensorrt-llm"},
}


def rules_of(result: Verdict, *levels: str) -> set[str]:
    return {f.rule for f in result.findings if f.level in (levels or ("error", "warning", "info"))}


@pytest.mark.parametrize("kind", CONFIGS)
def test_good_folders(kind: str, tmp_path: Path) -> None:
    result = verify_folder(Folder(kind).save(tmp_path / "model"))
    assert result.engines is not None
    verdicts = {name: one.verdict for name, one in result.engines.items()}
    expected = {engine: "loads" if engine in LOADS[kind] else "refused" for engine in ENGINES}
    explained = {name: one.findings for name, one in result.engines.items()}
    assert verdicts == expected, explained
    json.dumps(result.to_json())


def edit_qc(**changes: Any) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        assert folder.qc is not None
        folder.qc |= changes

    return edit


def edit_group(**changes: Any) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        assert folder.qc is not None
        folder.qc["config_groups"]["group_0"] |= changes

    return edit


def without(*keys: str) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        for key in keys:
            del (folder.qc or {})[key]

    return edit


def drop(suffix: str) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        folder.tensors = {name: t for name, t in folder.tensors.items() if not name.endswith(suffix)}

    return edit


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        folder.tensors[name] = make(folder.tensors[name].clone())

    return edit


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.flatten().index_fill(0, torch.tensor([0]), value).reshape(t.shape)


def add(name: str) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        folder.tensors[name] = torch.ones(4)

    return edit


def half(folder: Folder) -> None:
    folder.config["dtype"] = "float16"


def dense(*names: str, ignore: bool = False) -> Callable[[Folder], None]:
    def edit(folder: Folder) -> None:
        for name in names:
            folder.dense(name)
        if ignore and folder.qc is not None:
            folder.qc["ignore"] += list(names)

    return edit


def two_groups(folder: Folder) -> None:
    """q_proj in a scheme of its own."""
    assert folder.qc is not None
    first = folder.qc["config_groups"]["group_0"]
    other = first | {"targets": [r"re:.*q_proj$"], "weights": integer(4, 32)}
    folder.qc["config_groups"] = {"group_1": other, "group_0": first}
    for name in SHAPES:
        if name.endswith("q_proj"):
            folder.tensors[f"{name}.weight_scale"] = torch.ones(256, 8, dtype=torch.bfloat16)


def quarter_blocks(folder: Folder) -> None:
    """k_proj of 64 rows: its block reaches into v_proj's rows."""
    folder.config["num_key_value_heads"] = 1
    for name in list(SHAPES):
        if name.endswith(("k_proj", "v_proj")):
            folder.tensors[f"{name}.weight"] = folder.tensors[f"{name}.weight"][:64].contiguous()
            folder.tensors[f"{name}.weight_scale"] = folder.tensors[f"{name}.weight_scale"][:1].contiguous()


def odd_columns(folder: Folder) -> None:
    """down_proj of 480 columns with groups of 128."""
    name = "model.layers.1.mlp.down_proj"
    folder.tensors[f"{name}.weight_shape"] = torch.tensor([256, 480])
    folder.tensors[f"{name}.weight_packed"] = torch.zeros(256, 60, dtype=torch.int32)


Broken = tuple[str, Callable[[Folder], None], str, str, str]
BROKEN: dict[str, Broken] = {  # what is broken: (good folder, how, engine, rule, level)
    "no status": ("W4A16", without("quantization_status"), "transformers", "ct-status", "error"),
    "no status, vllm": ("W4A16", without("quantization_status"), "vllm", "ct-status", "warning"),
    "head not ignored": ("W4A16", edit_qc(ignore=[]), "transformers", "head", "error"),
    "head not excluded": ("modelopt fp8", edit_qc(ignore=[]), "vllm", "head", "error"),
    "gptq without g_idx": ("gptq", drop("g_idx"), "transformers", "gptq-g-idx", "error"),
    "gptq without g_idx, vllm": ("gptq", drop("g_idx"), "vllm", "gptq-g-idx", "warning"),
    "gptq v1 for v2": ("gptq", edit_qc(checkpoint_format="gptq_v2"), "transformers", "zero-points", "error"),
    "gptq v2 for v1": ("gptq v2", without("checkpoint_format"), "transformers", "zero-points", "error"),
    "awq sym zeros": (
        "awq sym", put(f"{Q0}.qzeros", lambda t: t * 0), "vllm", "zero-points", "error"),
    "nvfp4 reciprocal": (
        "NVFP4", put(f"{O0}.weight_global_scale", lambda t: 1 / t), "vllm", "nvfp4-reciprocal", "error"),
    "modelopt nvfp4 reciprocal": (
        "modelopt nvfp4", put(f"{O0}.weight_scale_2", lambda t: 1 / t), "vllm", "nvfp4-reciprocal", "error"),
    "nvfp4 unequal": ("NVFP4", put(f"{Q0}.weight_global_scale", lambda t: t * 2), "vllm", "fused-scales", "error"),
    "modelopt nvfp4 unequal": (
        "modelopt nvfp4", put(f"{UP0}.weight_scale_2", lambda t: t * 2), "sglang", "fused-scales", "error"),
    "nvfp4 unequal inputs": (
        "NVFP4", put(f"{K0}.input_global_scale", lambda t: t * 2), "vllm", "fused-scales", "warning"),
    "int8 static unequal": ("W8A8 static", put(f"{K0}.input_scale", lambda t: t * 2), "vllm", "fused-scales", "error"),
    "fp8 unequal": ("FP8", put(f"{K0}.weight_scale", lambda t: t * 2), "vllm", "fused-scales", "warning"),
    "desc_act": ("gptq", edit_qc(desc_act=True), "vllm", "gptq-desc-act", "error"),
    "desc_act by rule": ("gptq", edit_qc(dynamic={".*up.*": {"desc_act": True}}), "vllm", "gptq-desc-act", "error"),
    "actorder": ("W4A16", edit_group(weights=integer() | {"actorder": "group"}), "vllm", "ct-scheme", "error"),
    "actorder true": (
        "W4A16", edit_group(weights=integer() | {"actorder": True}), "transformers", "ct-actorder", "error"),
    "group of 128 in 480": ("W4A16", odd_columns, "vllm", "group-divides", "error"),
    "part of qkv ignored": ("W4A16", dense(Q0, ignore=True), "vllm", "fused-partly", "error"),
    "part of gate_up ignored": ("W4A16", dense(UP0, ignore=True), "sglang", "fused-partly", "error"),
    "two schemes in qkv": ("W4A16", two_groups, "vllm", "fused-schemes", "error"),
    "dense but not ignored": ("W4A16", dense(O0), "vllm", "missing-packed", "error"),
    "packed but ignored": ("W4A16", edit_qc(ignore=["lm_head", O0]), "vllm", "untargeted", "error"),
    "NaN scale": ("W4A16", put(f"{Q0}.weight_scale", filled(float("nan"))), "vllm", "scale-nan", "error"),
    "inf scale": ("gptq", put(f"{Q0}.scales", filled(float("inf"))), "sglang", "scale-nan", "error"),
    "NaN e8m0": ("MXFP4", put(f"{Q0}.weight_scale", filled(255)), "vllm", "scale-nan", "error"),
    "zero scale": ("W4A16", put(f"{Q0}.weight_scale", filled(0)), "vllm", "scale-zero", "warning"),
    "zero input scale": ("W8A8 static", put(f"{O0}.input_scale", filled(0)), "vllm", "scale-zero", "error"),
    "negative input scale": ("FP8", put(f"{O0}.input_scale", lambda t: -t), "vllm", "scale-negative", "error"),
    "new ct field": (
        "W4A16", edit_group(weights=integer() | {"zero_dtype": "int8"}), "vllm", "ct-unknown-key", "error"),
    "new group field": ("W4A16", edit_group(kernel="x"), "transformers", "ct-unknown-key", "error"),
    "mxfp6": (
        "W4A16", edit_group(weights=floating("group", num_bits=6, group_size=32)), "vllm", "ct-arguments", "error"),
    "mxfp6 format": ("MXFP8", edit_group(format="mxfp6-pack-quantized"), "sglang", "ct-format", "error"),
    "sparsity": (
        "W4A16", edit_qc(sparsity_config={"format": "dense", "targets": ["Linear"]}), "vllm", "ct-sparsity", "error"),
    "no targets": ("W4A16", edit_group(targets=None), "vllm", "ct-targets", "error"),
    "substring ignore": ("W4A16", edit_qc(ignore=["lm_head", "self_attn"]), "vllm", "ct-ignore-part", "warning"),
    "bad regex": ("W4A16", edit_qc(ignore=["lm_head", "re:*("]), "vllm", "ct-regex", "error"),
    "int8 kv": ("kv", edit_qc(kv_cache_scheme=KV | {"type": "int"}), "vllm", "kv-scheme", "error"),
    "asym kv": ("kv", edit_qc(kv_cache_scheme=KV | {"symmetric": False}), "sglang", "kv-scheme", "error"),
    "kv per head, sglang": (
        "kv", edit_qc(kv_cache_scheme=KV | {"strategy": "attn_head"}), "sglang", "kv-scheme", "error"),
    "kv scale missing": ("kv", drop("0.self_attn.v_scale"), "vllm", "kv-missing", "warning"),
    "kv scales per head": (
        "kv", edit_qc(kv_cache_scheme=KV | {"strategy": "attn_head"}), "vllm", "kv-shape", "error"),
    "kv channels": ("W4A16", add("model.layers.0.self_attn.v_channels"), "vllm", "kv-channels", "error"),
    "kv channels, transformers": (
        "W4A16", add("model.layers.0.self_attn.k_channels"), "transformers", "kv-channels", "info"),
    "padded words": (
        "W3A16", put(f"{O0}.weight_packed", lambda t: torch.zeros(256, 26).int()), "vllm", "old-packing", "error"),
    "scaled gelu": ("awq", add("model.layers.0.mlp.act.scales"), "vllm", "awq-act-scales", "error"),
    "fbgemm": ("FP8", edit_qc(quant_method="fbgemm_fp8"), "vllm", "method-deprecated", "warning"),
    "mxfp6 in transformers": (
        "MXFP8", edit_group(format="mxfp6-pack-quantized"), "transformers", "ct-newer", "warning"),
    "W4A8-FP8 in fp16": ("W4A8-FP8", half, "vllm", "w4a8-dtype", "warning"),
    "transform": (
        "W4A16", edit_qc(transform_config={"config_groups": {"a": {}}}), "transformers", "ct-transform", "error"),
    "asym gptq": ("gptq", edit_qc(sym=False), "vllm", "gptq-type", "error"),
    "gptq group 16": ("gptq", edit_qc(group_size=16), "vllm", "gptq-group", "error"),
    "gptq without sym": ("gptq", without("sym"), "vllm", "gptq-keys", "error"),
    "gptq damping": ("gptq", edit_qc(damp_percent=1), "transformers", "gptq-damping", "error"),
    "awq of 3 bits": ("awq", edit_qc(bits=3), "vllm", "awq-bits", "error"),
    "awq gemv": ("awq", edit_qc(version="gemv"), "vllm", "awq-version", "error"),
    "fp8 without activation_scheme": ("fp8", without("activation_scheme"), "vllm", "fp8-activation", "error"),
    "fp8 static blocks": ("fp8 block", edit_qc(activation_scheme="static"), "vllm", "fp8-activation", "error"),
    "fp8 in transformers": ("fp8", edit_qc(), "transformers", "fp8-dialect", "error"),
    "modelopt algo": ("modelopt fp8", edit_qc(quant_algo="W4A16_AWQ"), "vllm", "modelopt-algo", "error"),
    "modelopt in transformers": ("modelopt fp8", edit_qc(), "transformers", "method", "error"),
    "block crosses layers": ("FP8 block", quarter_blocks, "vllm", "block-merge", "error"),
    "scale tensor missing": ("W4A16", drop("o_proj.weight_scale"), "vllm", "tensor-missing", "error"),
    "zero point missing": ("W4A16 asym", drop("o_proj.weight_zero_point"), "vllm", "tensor-missing", "error"),
    "wrong dtype": ("FP8", put(f"{O0}.weight", lambda t: t.view(torch.int8)), "vllm", "tensor-dtype", "error"),
    "wrong shape": ("W8A16", put(f"{O0}.weight_scale", lambda t: t.flatten()), "vllm", "tensor-shape", "error"),
    "weight_shape": ("W4A16", put(f"{O0}.weight_shape", lambda t: t * 2), "vllm", "weight-shape", "error"),
    "asym told sym": ("W4A16 asym", edit_group(weights=integer()), "transformers", "tensor-extra", "warning"),
    "asym in transformers": ("W4A16 asym", edit_qc(), "transformers", "ct-asymmetric", "warning"),
    "3 bit in transformers": ("W3A16", edit_qc(), "transformers", "ct-bits", "warning"),
    "group 256": ("W4A16", edit_group(weights=integer(4, 256)), "vllm", "kernel-slow", "warning"),
    "bitsandbytes": ("W4A16", edit_qc(quant_method="bitsandbytes"), "vllm", "method", "error"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, tmp_path: Path) -> None:
    kind, break_it, engine, rule, level = BROKEN[name]
    folder = Folder(kind)
    break_it(folder)
    result = verify_folder(folder.save(tmp_path / "model"), engine)
    levels = {f.rule: f.level for f in result.findings}
    assert levels.get(rule) == level, result.findings
    assert (result.verdict == "refused") == ("error" in levels.values())
    assert all(f.message and (f.remedy or f.level == "info") for f in result.findings)
    good = verify_folder(Folder(kind).save(tmp_path / "good"), engine)
    if rule not in ("fp8-dialect", "ct-asymmetric", "ct-bits", "method"):
        assert rule not in rules_of(good)


VALUES = {"fused-scales", "nvfp4-reciprocal", "scale-nan", "scale-negative", "scale-zero", "tied-head", "zero-points"}
WRITER = {"no-tokenizer", "no-side-config"}  # what stands beside the tensors


@pytest.mark.parametrize("name", [*BROKEN, *CONFIGS, "no lm_head", "no config"])
def test_layout_is_judged_as_the_folder_is(name: str, tmp_path: Path) -> None:
    """verify_layout says before writing what verify_folder says of the result, but for what only values can tell."""
    kind, break_it, engine = BROKEN.get(name, (name, edit_qc(), "vllm"))[:3]
    folder = Folder(kind if kind in CONFIGS else "W4A16")
    break_it(folder)
    if name == "no lm_head":
        del folder.tensors["lm_head.weight"]
    if name == "no config":
        folder.qc = None
    checkpoint = Checkpoint.open(folder.save(tmp_path / "model"))
    said = {key: t for key, t in folder.tensors.items() if key.endswith(".weight_shape")}
    shapes = {key.removesuffix(".weight_shape"): (int(t[0]), int(t[1])) for key, t in said.items()}
    for each in (engine, "vllm", "sglang", "transformers"):
        written = verify_folder(checkpoint.folder, each).findings
        planned = verify_layout(checkpoint.tensors, shapes, checkpoint.config, each)
        assert set(planned) == {finding for finding in written if finding.rule not in VALUES | WRITER}, each
        assert planned == sorted(planned, key=lambda finding: ("error", "warning", "info").index(finding.level))


def test_layout_needs_a_known_engine() -> None:
    with pytest.raises(UserError, match="unknown engine 'llm'"):
        verify_layout({}, {}, {"quantization_config": CONFIGS["W4A16"]}, "llm")


def sharded(path: Path) -> Path:
    return Folder("W4A16").save(path / "model", shards=2)


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def rewrite(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_folder_is_good(tmp_path: Path) -> None:
    result = verify_folder(sharded(tmp_path), "vllm")
    assert result.verdict == "loads"
    assert rules_of(result) == {"cpu-int8-inputs"}


@pytest.mark.parametrize(
    ("rule", "level"),
    [
        ("shard-missing", "error"), ("tensor-twice", "error"), ("index-mismatch", "error"), ("index-extra", "warning"),
        ("total-size", "warning"), ("header", "error"), ("stale", "warning"), ("two-models", "error"),
        ("index", "error"), ("metadata", "warning"), ("no-tokenizer", "info"), ("unreadable", "error"),
    ],
)  # fmt: skip
def test_files(rule: str, level: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index, first = index_of(folder), folder / "model-00001-of-00002.safetensors"
    second = first.with_name("model-00002-of-00002.safetensors")
    if rule == "shard-missing":
        first.unlink()
    elif rule == "tensor-twice":
        second.write_bytes(first.read_bytes())
    elif rule == "index-mismatch":
        rewrite(folder, index | {"weight_map": index["weight_map"] | {"model.ghost.weight": first.name}})
    elif rule == "index-extra":
        rewrite(folder, index | {"weight_map": {k: v for k, v in index["weight_map"].items() if k != "lm_head.weight"}})
    elif rule == "total-size":
        rewrite(folder, index | {"metadata": {"total_size": 1}})
    elif rule == "header":
        first.write_bytes(first.read_bytes()[:-100])
    elif rule == "stale":
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif rule == "two-models":
        (folder / "model.safetensors").write_bytes(first.read_bytes())
    elif rule == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    elif rule == "metadata":
        data = first.read_bytes()
        first.write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"np"}'))
    elif rule == "no-tokenizer":
        (folder / "tokenizer.json").unlink()
    elif rule == "unreadable":
        (folder / "config.json").write_text("{")
    result = verify_folder(folder, "vllm")
    assert {f.rule: f.level for f in result.findings}.get(rule) == level, result.findings


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_stale_side_configs(name: str, tmp_path: Path) -> None:
    folder = Folder("W4A16").save(tmp_path / "model")
    (folder / name).write_text("{}")
    assert "stale" in rules_of(verify_folder(folder, "vllm"), "warning")


def test_side_config_that_disagrees(tmp_path: Path) -> None:
    folder = Folder("gptq").save(tmp_path / "model")
    (folder / "quantize_config.json").write_text(json.dumps(CONFIGS["gptq"]))
    assert "side-config" not in rules_of(verify_folder(folder, "vllm"))
    (folder / "quantize_config.json").write_text(json.dumps(CONFIGS["gptq"] | {"bits": 8}))
    assert "side-config" in rules_of(verify_folder(folder, "vllm"), "error")


def test_config_of_its_own_file(tmp_path: Path) -> None:
    folder = Folder("modelopt fp8")
    folder.qc = None
    path = folder.save(tmp_path / "model")
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    assert verify_folder(path, "vllm").verdict == "loads"
    (path / "hf_quant_config.json").unlink()
    assert "no-config" in rules_of(verify_folder(path, "vllm"), "error")


def test_heads(tmp_path: Path) -> None:
    folder = Folder("W4A16")
    folder.config["tie_word_embeddings"] = True
    assert "tied-head" in rules_of(verify_folder(folder.save(tmp_path / "tied"), "vllm"), "warning")
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"]
    assert "tied-head" not in rules_of(verify_folder(folder.save(tmp_path / "equal"), "vllm"))
    del folder.tensors["lm_head.weight"]
    assert verify_folder(folder.save(tmp_path / "absent"), "transformers").verdict == "loads"
    assert folder.qc is not None
    folder.qc["ignore"] = []
    assert "head" in rules_of(verify_folder(folder.save(tmp_path / "tied, not ignored"), "transformers"), "error")
    folder.config["tie_word_embeddings"] = False
    assert "head-missing" in rules_of(verify_folder(folder.save(tmp_path / "missing"), "vllm"), "error")


def test_dense_folder(tmp_path: Path) -> None:
    result = verify_folder(Folder("dense").save(tmp_path / "model"), "vllm")
    assert (result.verdict, rules_of(result)) == ("loads", {"dense"})


def test_unknown_method_is_unknown(tmp_path: Path) -> None:
    folder = Folder("W4A16")
    folder.qc = {"quant_method": "torchao"}
    assert verify_folder(folder.save(tmp_path / "model"), "vllm").verdict == "unknown"


def test_no_folder_and_bad_arguments(tmp_path: Path) -> None:
    assert rules_of(verify_folder(tmp_path / "none", "vllm")) == {"no-folder"}
    with pytest.raises(UserError, match="unknown engine 'llm'"):
        verify_folder(tmp_path, "llm")
    with pytest.raises(UserError, match="at least 1"):
        verify_folder(tmp_path, None, 0)


def test_checksums(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    hashes = file_hashes(folder)
    assert sorted(hashes) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "quantkit-report.json").write_text(json.dumps({"files": hashes}))
    assert rules_of(verify_folder(folder, "vllm", checksums=True)) == {"cpu-int8-inputs"}
    path = folder / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert rules_of(verify_folder(folder, "vllm", checksums=True), "error") == {"checksum"}
    assert verify_folder(folder, "vllm").verdict == "loads"  # sums are checked on request only


def errors_of(config: dict[str, Any], engine: str = "vllm", tp: int = 1, **changes: Any) -> set[str]:
    shapes, model = changes.get("shapes", SHAPES), MODEL | changes.get("model", {})
    found = preflight(config, shapes, shapes | DENSE, model, engine, tp)
    return {finding.rule for finding in found if finding.level == "error"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_preflight_agrees_with_folders(kind: str) -> None:
    for engine in ENGINES:
        refused = bool(errors_of(CONFIGS[kind], engine))
        if (kind, engine) != ("fp8", "transformers"):  # only the tensors' names tell the dialects apart
            assert refused == (engine not in LOADS[kind]), (engine, errors_of(CONFIGS[kind], engine))


def test_tensor_parallel() -> None:
    w4, w32 = CONFIGS["W4A16"], ct(integer(4, 32), "pack-quantized")
    assert errors_of(w4, tp=2) == set()
    assert errors_of(w4, tp=4) == {"tp-group"}  # o_proj: 256 / 4 = 64 columns, groups of 128
    assert errors_of(w32, tp=4) == set()  # one key/value head for each two GPUs
    assert errors_of(w32, tp=3) == {"tp-heads", "tp-group"}
    assert errors_of(CONFIGS["FP8 block"], tp=4) == {"block-merge"}
    assert errors_of(CONFIGS["awq"], "transformers", tp=4) == set()
    wide = {"model.layers.0.mlp.up_proj": (520, 256)}
    assert errors_of(CONFIGS["awq"], shapes=wide) == set()
    assert errors_of(CONFIGS["awq"], shapes=wide, tp=2) == {"tp-group"}  # 260 is not whole words of 8


def test_key_heads_are_not_cut() -> None:
    """4 GPUs for 2 key/value heads: two GPUs hold the same head of 24 rows; 12 rows would not be whole words."""
    assert errors_of(CONFIGS["awq"], shapes={"a.k_proj": (48, 128)}, tp=4) == set()
    assert errors_of(CONFIGS["awq"], shapes={"a.q_proj": (48, 128)}, tp=4) == {"tp-group"}


def test_words() -> None:
    assert errors_of(CONFIGS["awq"], shapes={"a.q": (36, 128)}) == {"words"}
    assert errors_of(CONFIGS["gptq"], shapes={"a.q": (36, 128)}) == {"words"}


def test_fused_names_may_be_ignored() -> None:
    attention = [name for name in SHAPES if "self_attn" in name and "o_proj" not in name]
    shapes = {name: shape for name, shape in SHAPES.items() if name not in attention}
    config = CONFIGS["W4A16"] | {"ignore": ["lm_head", r"re:.*qkv_proj"]}
    found = preflight(config, shapes, SHAPES | DENSE, MODEL, "vllm")
    assert not [finding for finding in found if finding.level == "error"]
    assert "missing-packed" in {f.rule for f in preflight(config, shapes, SHAPES | DENSE, MODEL, "transformers")}


def test_kernels(tmp_path: Path) -> None:
    def kernel(kind: str, machine: str) -> str:
        result = verify_folder(Folder(kind).save(tmp_path / f"{kind} {machine}"), "vllm")
        return result.kernels[0].kernel[machine]

    assert kernel("W4A16", "Hopper") == "Machete"
    assert kernel("W4A16", "Ampere") == "Marlin"
    assert kernel("W3A16", "Ada") == "Humming"
    assert kernel("W4A8-FP8", "Ampere") == "none"
    assert kernel("FP8", "Ampere") == "Marlin (weight-only)"
    result = verify_folder(Folder("W4A8-FP8").save(tmp_path / "model"), "vllm")
    assert {name for name, how in result.hardware.items() if how == "yes"} == {"Hopper"}


def test_kernels_of_merged_layers() -> None:
    """Machete wants rows in multiples of 128: of the whole layer the engine makes."""

    def on_hopper(shapes: dict[str, tuple[int, int]], tp: int = 1) -> set[str]:
        subject = make_subject(CONFIGS["W4A16"], shapes, shapes, MODEL, "vllm", tp)
        return {row.kernel["Hopper"] for row in kernel_table(subject)}

    assert on_hopper({"a.q_proj": (256, 256), "a.k_proj": (64, 256), "a.v_proj": (64, 256)}) == {"Machete"}
    assert on_hopper({"a.q_proj": (256, 256), "a.k_proj": (32, 256), "a.v_proj": (32, 256)}) == {"Marlin"}
    assert on_hopper({"a.o_proj": (192, 256)}) == {"Marlin"}
    assert on_hopper({"a.fc1": (256, 256)}) == {"Machete"}
    assert on_hopper({"a.fc1": (256, 256)}, tp=4) == {"Marlin"}


@pytest.mark.parametrize("broken", [{}, {"quant_method": 3}, {"quant_method": "compressed-tensors", "config_groups": 7},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": [1], "weights": []}}},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": []}}},
     "ignore": "lm_head", "kv_cache_scheme": 4, "transform_config": 5, "sparsity_config": []},
    {"quant_method": "gptq", "bits": "four", "dynamic": [], "group_size": None},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": {"*": 3}},
    {"quant_method": "awq", "bits": {}, "version": 3, "modules_to_not_convert": 3},
    {"quant_method": "fp8", "weight_block_size": "128", "ignored_layers": {}},
    {"quant_method": "modelopt", "quantization": []}, {"quant_method": "modelopt", "quant_algo": 8, "ignore": 1},
])  # fmt: skip
def test_foreign_configs_give_findings(broken: dict[str, Any]) -> None:
    for engine in ENGINES:
        assert errors_of(broken, engine), engine


JUNK: list[Any] = [None, 3, -1, 0, "x", [], {}, [1], [None], {"a": 1}, True, 1.5, float("nan"), 10**30]


def paths(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value, itself included."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [start, *(path for key in keys for path in paths(value[key], (*start, key)))]


@pytest.mark.parametrize("kind", ["kv", "FP8 block", "NVFP4", "gptq", "awq", "fp8 block", "modelopt nvfp4"])
def test_no_junk_raises(kind: str, tmp_path: Path) -> None:
    more = {"gptq": {"dynamic": {"+:.*": {"bits": 8}}, "modules_in_block_to_quantize": ["q_proj"]}}
    more["kv"] = {"transform_config": {"config_groups": {"a": {}}}, "sparsity_config": {"targets": ["Linear"]}}
    good = CONFIGS[kind] | more.get(kind, {})
    folder = Folder(kind).save(tmp_path / "model")
    for path in paths(good)[1:]:
        for junk in JUNK:
            config = json.loads(json.dumps(good))
            parent = config
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = junk
            for engine in ENGINES:
                preflight(config, SHAPES, SHAPES | DENSE, MODEL, engine, 2)
            if junk == "x":
                (folder / "config.json").write_text(json.dumps(MODEL | {"quantization_config": config}))
                json.dumps(verify_folder(folder).to_json())


@pytest.mark.parametrize("kind", ["kv", "gptq", "dense"])
def test_no_junk_in_config_raises(kind: str, tmp_path: Path) -> None:
    folder = Folder(kind)
    more = {"text_config": {"model_type": "x"}, "model_type": "falcon", "head_dim": 64, "torch_dtype": "float16"}
    folder.config |= more | {"kv_lora_rank": 3}
    path = folder.save(tmp_path / "model")
    good = json.loads((path / "config.json").read_text())
    for key in good:
        for junk in JUNK:
            (path / "config.json").write_text(json.dumps(good | {key: junk}))
            json.dumps(verify_folder(path, hardware="cpu").to_json())


def test_no_junk_in_files_raises(tmp_path: Path) -> None:
    """Index, side files, report and header: whatever stands there, verify answers with findings."""
    folder = Folder("gptq").save(tmp_path / "model", shards=2)
    index = index_of(folder)
    for junk in [*JUNK, *(index | {key: junk} for key in index for junk in JUNK)]:
        rewrite(folder, junk)
        json.dumps(verify_folder(folder).to_json())
    for name in ("../x.safetensors", "a" * 300, "a\0b", "", ".", "\ud800"):
        rewrite(folder, index | {"weight_map": dict.fromkeys(index["weight_map"], name)})
        assert rules_of(verify_folder(folder, "vllm"), "error") == {"shard-missing"}, name
    rewrite(folder, index)
    for name in ("quantize_config.json", "hf_quant_config.json", "quant_config.json", "quantkit-report.json"):
        for junk in [
            *JUNK,
            {"quantization": 3},
            {"quantization": {"quant_algo": []}},
            {"files": 3},
            {"files": {"x": []}},
        ]:
            (folder / name).write_text(json.dumps(junk))
            json.dumps(verify_folder(folder, checksums=True).to_json())
        (folder / name).write_bytes(b"\xff\xfe{")
        json.dumps(verify_folder(folder, checksums=True).to_json())
        (folder / name).unlink()
    for junk in JUNK:
        header = json.dumps({"__metadata__": junk}).encode()
        (folder / "model-00001-of-00002.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        json.dumps(verify_folder(folder).to_json())


def named(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    """Each gets one finding that says what it is and what to do, for every engine."""
    file, gguf = tmp_path / "model.safetensors", tmp_path / "m.gguf"
    file.write_bytes(b"")
    gguf.write_bytes(b"GGUF....")
    (tmp_path / "unnamed").write_bytes(b"GGUF....")
    cases = {
        file: "no-folder",
        tmp_path / "absent": "no-folder",
        gguf: "gguf",
        tmp_path / "unnamed": "gguf",
        named(tmp_path / "empty"): "no-folder",
        named(tmp_path / "config only", "config.json", "tokenizer.json"): "no-weights",
        named(tmp_path / "gguf folder", "config.json", "m-Q4_K_M.gguf", "README.md"): "gguf",
        named(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors"): "adapter",
        named(tmp_path / "old adapter", "adapter_model.bin"): "adapter",
        named(tmp_path / "shards without index", "config.json", "model-00001-of-00002.safetensors"): "no-weights",
    }
    for path, rule in cases.items():
        result = verify_folder(path, checksums=True)
        assert result.engines is not None
        for engine, one in result.engines.items():
            assert rules_of(one) - {"no-checksums"} == {rule}, (path, one.findings)
            assert one.findings[0].remedy
            assert one.verdict == "refused", engine


def test_adapter_beside_a_model_is_a_model(tmp_path: Path) -> None:
    folder = Folder("W4A16").save(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert verify_folder(folder, "vllm").verdict == "loads"


def test_experts_share_a_scheme() -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    experts = {f"model.layers.0.mlp.experts.{e}.{part}": (256, 256) for e in range(2) for part in parts}
    down = [name for name in experts if name.endswith("down_proj")]
    config = ct(integer(), "pack-quantized", ignore=["lm_head", *down])
    shapes = {name: shape for name, shape in experts.items() if name not in down}
    found = preflight(config, shapes, experts | DENSE, MODEL, "vllm")
    assert "experts-schemes" in {finding.rule for finding in found if finding.level == "error"}


def test_embeddings() -> None:
    shapes = {"model.embed_tokens": (64, 256)}
    group = ct(integer(), "pack-quantized")["config_groups"]["group_0"]
    target = {"group_0": group | {"targets": ["re:.*embed_tokens"]}}
    assert errors_of(ct(integer(), "pack-quantized", config_groups=target), shapes=shapes) == set()
    target["group_0"] |= {"weights": integer(symmetric=False)}
    assert errors_of(ct(integer(), "pack-quantized", config_groups=target), shapes=shapes) == {"embedding"}


def test_w4a8_fp8_shape() -> None:
    shapes = {"model.layers.0.self_attn.o_proj": (192, 256)}
    assert errors_of(ct(integer(), "pack-quantized", FP8_TOKEN), shapes=shapes) == {"w4a8-shape"}


def test_render(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    render_verdict(verify_folder(Folder("W4A16 asym").save(tmp_path / "model")).to_json(), console)
    text = console.export_text()
    assert "vllm" in text
    assert "[ct-asymmetric] (transformers)" in text
    assert "Machete on Hopper" in text
