"""verify: architectures that an engine loads wrongly or not at all, whatever the number format."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.verification import verify_folder
from tests.tiny_folders import Folder

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 4}


def architecture(kind: str, path: Path, model: dict[str, Any], names: dict[str, str]) -> Path:
    """A folder of format `kind` whose modules' last names and config.json are those of another architecture."""
    folder = Folder(kind)
    folder.config |= model
    renamed = {}
    for name, tensor in folder.tensors.items():
        parts = name.split(".")
        renamed[".".join([names.get(part, part) for part in parts])] = tensor
    folder.tensors = renamed
    return folder.save(path / "model")


def gpt2(kind: str, path: Path, **model: Any) -> Path:
    names = {"o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj", "gate_proj": "q_attn"}
    return architecture(kind, path, GPT2 | model, names)


def found(folder: Path, engine: str) -> dict[str, str]:
    return {f.rule: f.level for f in verify_folder(folder, engine).findings}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", ["FP8", "FP8 dynamic", "W8A8", "W8A8 static", "fp8", "modelopt fp8", "MXFP8"])
def test_conv1d_weights_are_transposed_by_servers(kind: str, engine: str, tmp_path: Path) -> None:
    folder = gpt2(kind, tmp_path)
    assert found(folder, engine).get("conv1d-transposed") == "error"
    wrong = [f for f in verify_folder(folder, engine).findings if f.rule == "conv1d-transposed"]
    assert "Conv1D" in wrong[0].message
    assert "transposes" in wrong[0].message
    assert wrong[0].where.startswith("model.layers.0.")


@pytest.mark.parametrize("kind", ["W4A16", "W4A16 asym", "W8A16", "NVFP4A16", "MXFP4A16", "gptq", "awq"])
def test_packed_conv1d_weights_are_not(kind: str, tmp_path: Path) -> None:
    assert "conv1d-transposed" not in found(gpt2(kind, tmp_path), "vllm")


def test_only_conv1d_layers_of_such_an_architecture(tmp_path: Path) -> None:
    """GPT-BigCode has linears of the same names, and a plain q_proj in a GPT-2 is no Conv1D."""
    assert "conv1d-transposed" not in found(gpt2("FP8", tmp_path, model_type="gpt_bigcode"), "vllm")
    (tmp_path / "b").mkdir()
    assert "conv1d-transposed" not in found(architecture("FP8", tmp_path / "b", GPT2, {}), "vllm")


def test_llama_cpp_transposes_every_conv1d(tmp_path: Path) -> None:
    assert found(gpt2("W4A16", tmp_path), "llama.cpp").get("conv1d-transposed") == "error"


@pytest.mark.parametrize("kind", ["W4A16", "W8A16", "FP8 dynamic", "W8A8", "awq", "fp8 block"])
def test_transformers_does_not_replace_conv1d(kind: str, tmp_path: Path) -> None:
    assert found(gpt2(kind, tmp_path), "transformers").get("conv1d") == "error"


def test_gptq_replaces_conv1d(tmp_path: Path) -> None:
    assert "conv1d" not in found(gpt2("gptq", tmp_path), "transformers")


CRASHING = {  # model type: (layers of the folder that are named like this, refused when they are packed)
    "falcon": ("up_proj", "dense_h_to_4h", True),
    "mamba": ("up_proj", "out_proj", True),
    "mamba2": ("up_proj", "out_proj", True),
    "falcon_mamba": ("up_proj", "out_proj", True),
    "gpt_bigcode": ("up_proj", "c_proj", True),
    "nanochat": ("up_proj", "up_proj", True),  # o_proj
    "recurrent_gemma": ("up_proj", "linear_x", True),
    "bloom": ("up_proj", "dense_h_to_4h", False),
    "jamba": ("up_proj", "out_proj", False),
}


@pytest.mark.parametrize("kind", CRASHING)
def test_types_whose_init_reads_weight(kind: str, tmp_path: Path) -> None:
    old, new, crashes = CRASHING[kind]
    packed = architecture("W4A16", tmp_path, {"model_type": kind}, {old: new})
    assert (found(packed, "transformers").get("init-weights") == "error") == crashes
    assert "init-weights" not in found(packed, "vllm")
    (tmp_path / "8 bits").mkdir()
    stored = architecture("FP8 dynamic", tmp_path / "8 bits", {"model_type": kind}, {old: new})
    assert "init-weights" not in found(stored, "transformers")


def test_init_reads_the_named_layers_only(tmp_path: Path) -> None:
    assert "init-weights" not in found(
        architecture("W4A16", tmp_path, {"model_type": "mamba"}, {"up_proj": "in_proj"}), "transformers"
    )


def test_type_of_the_text_model_counts(tmp_path: Path) -> None:
    model = {"model_type": "some_vlm", "text_config": {"model_type": "falcon"}}
    assert "init-weights" in found(architecture("W4A16", tmp_path, model, {}), "transformers")


@pytest.mark.parametrize(("ignore", "loads"), [(["lm_head"], True), (["embed_out"], False), ([], False)])
def test_gpt_neox_head_has_another_name_in_transformers(ignore: list[str], loads: bool, tmp_path: Path) -> None:
    """The tensor is embed_out, transformers 5 calls the module lm_head and goes by that."""
    folder = architecture("W4A16", tmp_path, {"model_type": "gpt_neox"}, {"lm_head": "embed_out"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ignore
    (folder / "config.json").write_text(json.dumps(config))
    assert ("head" in found(folder, "transformers")) != loads


def test_tied_head_by_the_name_the_config_gives_it(tmp_path: Path) -> None:
    """No tensor shows the name of a tied head: output_projection in BioGPT, embed_out in Japanese GPT-NeoX."""
    for kind, name in (("biogpt", "output_projection"), ("gpt_neox_japanese", "embed_out")):
        folder = Folder("W4A16")
        del folder.tensors["lm_head.weight"]
        folder.config |= {"tie_word_embeddings": True, "model_type": kind}
        assert folder.qc is not None
        folder.qc["ignore"] = [name]
        assert "head" not in found(folder.save(tmp_path / kind), "transformers")
        folder.qc["ignore"] = []
        assert "head" in found(folder.save(tmp_path / f"{kind}, not ignored"), "transformers")


def test_transformers_ignores_a_quantized_cache(tmp_path: Path) -> None:
    folder = Folder("kv").save(tmp_path / "model")
    assert found(folder, "transformers").get("kv-ignored") == "warning"
    assert "kv-ignored" not in found(folder, "vllm")
    assert "kv-ignored" not in found(Folder("W4A16").save(tmp_path / "plain"), "transformers")
