"""Whole runs that write a GGUF: read by transformers' own loader, which knows nothing of quantkit."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.recipe.load import from_data
from quantkit.report.records import Report
from tests import gguf_models
from tests.gguf_models import VARIANTS
from tests.killed_run import killed_at

SAMPLES, SEQ = 8, 48
MODEL = Path(__file__).parents[2] / "examples/tiny-llama"
GPTQ: dict[str, Any] = {"weights": {"algorithm": {"gptq": {"sweeps": 1}}}}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def tiny(variant: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A random model of one of VARIANTS with the bundled tokenizer beside it."""

    def config() -> Any:
        made = VARIANTS[variant]()
        for key, value in {"vocab_size": 4096, **changes}.items():
            setattr(made, key, value)
        return made

    with monkeypatch.context() as patch:
        patch.setitem(gguf_models.VARIANTS, "wanted", config)
        gguf_models.make("wanted", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    return folder


def tokens() -> Tensor:
    return torch.randint(3, 4000, (SAMPLES + 1, SEQ), generator=torch.Generator().manual_seed(1))


def run(folder: Path, output: Path, recipe: dict[str, Any], ids_ST: Tensor | None = None) -> Report:
    data = {"calibration": {"samples": SAMPLES, "seq_len": SEQ}} | recipe
    given = list(tokens() if ids_ST is None else ids_ST)
    return quantkit.quantize(folder, data, output, calibration=given, device="cpu", progress=False)


# What transformers' GGUF loader leaves out: head sizes of its own, biases, Gemma's pattern of windows.
UNREAD = ("qwen3", "gemma3", "llama-biases")


def read(output: Path, variant: str) -> torch.nn.Module:
    """The model as transformers decodes it from the file, or quantkit where transformers cannot."""
    if variant.startswith(UNREAD):
        return quantkit.load(output, dtype=torch.float32, device="cpu")
    return AutoModelForCausalLM.from_pretrained(output, gguf_file="model.gguf", dtype=torch.float32).eval()


def kl_of(output: Path, folder: Path, variant: str) -> float:
    """KL of the file's model from the original on the window that calibration did not see, in float64."""
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, found = tokens()[SAMPLES:], []
    for model in (original, read(output, variant)):
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits.double().log_softmax(-1))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


CASES = [
    ("llama-tied", "q4_k_m", GPTQ),
    ("llama-head_dim", "q4_k_m", {}),
    ("mistral-window", "q4_0", GPTQ),
    ("qwen2", "q5_k_m", {}),
    ("qwen3-tied", "q3_k_m", GPTQ),
    ("gemma3", "q4_k_m", GPTQ),
    ("phi3", "iq4_xs", GPTQ),
    ("qwen3_moe", "q4_k_m", GPTQ),
    ("qwen3_moe", "q8_0", {}),
    ("llama-biases", "iq4_nl", GPTQ | {"transforms": ["awq"]}),
    ("llama", "q4_k_m", GPTQ | {"transforms": ["rotation"]}),
    ("llama-tied", "q4_k_m", GPTQ | {"transforms": ["rotation"]}),
    ("llama", "q5_1", GPTQ | {"propagate": "original"}),
]


@pytest.mark.parametrize(("variant", "mix", "recipe"), CASES, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)])
def test_held_out_figure_is_what_transformers_reads(
    variant: str, mix: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain at once: names, rows, norms, types, tables and blocks; a wrong one changes the figure a lot."""
    model = tiny(variant, tmp_path / "model", monkeypatch)
    report = run(model, tmp_path / "out", {"gguf": mix, **recipe})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "quantkit-report.json"}
    assert report.held_out is not None
    kl = kl_of(tmp_path / "out", model, variant)
    assert kl > 1e-6
    assert report.held_out.kl == pytest.approx(kl, rel=0.03)


def test_k_quants_of_wide_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-tied", tmp_path / "model", monkeypatch, **WIDE)
    report = run(model, tmp_path / "out", GPTQ | {"gguf": "q4_k_m"})
    assert report.gguf is not None
    assert report.gguf.types.keys() == {"Q4_K", "Q6_K", "F32"}
    assert [record.name for record in report.gguf.tables] == ["model.embed_tokens"]
    assert report.held_out is not None
    assert report.held_out.kl == pytest.approx(kl_of(tmp_path / "out", model, "llama-tied"), rel=0.03)
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    sizes = {kind.tensor_type.name: 0 for kind in reader.tensors}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += tensor.n_bytes
    assert sizes == {name: size for name, (_, size) in report.gguf.types.items()}
    said = json.loads(bytes(reader.fields["quantkit.recipe"].parts[-1]).decode())
    assert said["gguf"]["mix"] == "Q4_K_M"
    again = from_data(said | {"calibration": {}}).resolved()
    assert {key: again[key] for key in said} == {key: report.recipe[key] for key in said}
    assert "quantkit.calibration" in reader.fields


def test_gptq_is_far_better_than_rounding_on_the_bundled_model(tmp_path: Path) -> None:
    kl = {}
    for algorithm in ("gptq", "rtn"):
        calibration = {"data": str(MODEL / "calibration.txt"), "samples": 32, "seq_len": 128}
        recipe = {"gguf": "q4_k_m", "weights": {"algorithm": algorithm}, "calibration": calibration}
        report = quantkit.quantize(MODEL, recipe, tmp_path / algorithm, device="cpu", progress=False)
        assert report.held_out is not None
        kl[algorithm] = report.held_out.kl
    assert kl["gptq"] < 0.6 * kl["rtn"]


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_is_the_same_after_a_kill(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(variant, tmp_path / "model", monkeypatch)
    recipe = GPTQ | {"gguf": "q4_k_m"}
    whole = run(model, tmp_path / "whole", recipe)
    with killed_at(1):
        run(model, tmp_path / "out", recipe)
    resumed = run(model, tmp_path / "out", recipe)
    assert resumed.held_out == whole.held_out
    assert resumed.gguf == whole.gguf
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "whole/model.gguf").read_bytes()


def test_shards_hold_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    run(model, tmp_path / "one", {"gguf": "q8_0"})
    run(model, tmp_path / "many", {"gguf": "q8_0", "output": {"max_shard_gb": 2e-4}})
    names = sorted(path.name for path in (tmp_path / "many").glob("*.gguf"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.gguf"
    found: dict[str, np.ndarray] = {}
    for name in names:
        found |= {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "many" / name).tensors}
    whole = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "one/model.gguf").tensors}
    assert found.keys() == whole.keys()
    for name, data in whole.items():
        np.testing.assert_array_equal(found[name], data)


@pytest.mark.parametrize("shard", [5.0, 2e-4], ids=["one", "many"])
def test_a_measured_mix_fills_its_size_and_no_more(
    shard: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all files, with their keys and the vocabulary; a killed run goes on with the same types."""
    monkeypatch.setattr("quantkit.quantization.gguf_budget.FREE", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16"))
    model, size = tiny("llama", tmp_path / "model", monkeypatch), 600_000
    recipe = GPTQ | {"gguf": {"mix": {"size": size}}, "output": {"max_shard_gb": shard}}
    with killed_at(1):
        run(model, tmp_path / "out", recipe)
    report = run(model, tmp_path / "out", recipe)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert (len(files) > 1) == (shard < 1)
    assert 0.995 * size <= sum(file.stat().st_size for file in files) <= size
    assert report.gguf is not None
    assert report.gguf.measured is not None
    assert len(report.gguf.types) > 2


def test_blocks_without_a_quantized_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    report = run(model, tmp_path / "out", GPTQ | {"gguf": {"mix": "q8_0", "tensor_types": {r"blk\.0": "f16"}}})
    assert report.gguf is not None
    assert report.gguf.types["F16"][0] == 7


def test_ignored_linears_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    report = run(model, tmp_path / "out", {"gguf": "q4_0", "ignore": [r"re:.*\.0\.mlp\.down_proj"]})
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "Q4_0"
    assert ("model.layers.0.mlp.down_proj", "the recipe says so") in [(s.name, s.reason) for s in report.skipped]


def test_one_expert_alone_cannot_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_moe", tmp_path / "model", monkeypatch)
    with pytest.raises(quantkit.UserError, match="all experts of a layer in one tensor"):
        run(model, tmp_path / "out", {"gguf": "q4_0", "ignore": [r"re:.*\.0\.mlp\.experts\.1\.down_proj"]})


def test_types_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    section = {
        "mix": "q4_0",
        "tensor_types": {r"\.0\.attn_v": "q8_0", "attn_v": "f16"},
        "output": "q5_1",
        "token_embedding": "bf16",
    }
    run(model, tmp_path / "out", {"gguf": section})
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.1.attn_v.weight"] == "F16"
    assert types["output.weight"] == "Q5_1"
    assert types["token_embd.weight"] == "BF16"
    with pytest.raises(quantkit.UserError, match="attn_vv"):
        run(model, tmp_path / "other", {"gguf": {"mix": "q4_0", "tensor_types": {"attn_vv": "q8_0"}}})
    assert not list(tmp_path.glob("other*"))


def test_without_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    recipe = {"gguf": "q4_0", "calibration": None}
    report = quantkit.quantize(model, recipe, tmp_path / "out", device="cpu", progress=False)
    assert report.held_out is None
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    reader = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    down = reader["blk.0.ffn_down.weight"]
    expected = gguf.quants.quantize(
        state["model.layers.0.mlp.down_proj.weight"].numpy(), gguf.GGMLQuantizationType.Q4_0
    )
    np.testing.assert_array_equal(down.data, expected)  # without importance: the very bytes of llama.cpp's quantizer
