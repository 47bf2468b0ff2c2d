"""What needs no torch is answered without it: neither torch nor transformers is imported, whatever is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_inspect import config, packed, weights, write

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny-llama"
# Runs each command in turn in one process, and says what it printed and what was imported by then.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from quantkit.cli.main import app
found = []
for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(app, arguments)
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    found.append({"code": result.exit_code, "output": result.output, "heavy": heavy})
print(json.dumps(found))
"""


def run(commands: list[list[str]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def folder(path: Path, *files: str, **contents: Any) -> Path:
    """A folder of empty files and JSON files."""
    path.mkdir()
    for name in files:
        (path / name).write_bytes(b"")
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def kinds(at: Path) -> dict[str, tuple[Path | str, str]]:
    """Wrong inputs by name: the path, and what the message says it is."""
    (at / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    (at / "alone.safetensors").write_bytes(bytes(16))
    (at / "weights.pth").write_bytes(b"PK")
    (at / "notes.txt").write_text("a model, I think")
    (at / "recipe.yaml").write_text("weights: {}")
    shutil.copytree(MODEL, at / "several/a")
    shutil.copytree(MODEL, at / "several/b")
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    t5 = {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}
    mlx = {"model_type": "llama", "quantization": {"group_size": 64, "bits": 4}}
    adapter = {"base_model_name_or_path": "org/base"}
    weights = "model.safetensors"
    return {
        "missing": (at / "nope", "no such folder"),
        "typo": (at / "severa", f"did you mean {at / 'several'}?"),
        "lora": (folder(at / "lora", "adapter_model.safetensors", adapter_config=adapter), "base model: org/base"),
        "gguf file": (at / "m.gguf", "a GGUF file"),
        "gguf folder": (folder(at / "ggufs", "m-Q4_K_M.gguf", config={}), "a folder of GGUF files"),
        "safetensors": (at / "alone.safetensors", "a single safetensors file"),
        "pytorch file": (at / "weights.pth", "a single PyTorch file"),
        "text file": (at / "notes.txt", "a text file"),
        "recipe": (at / "recipe.yaml", "a recipe is given as --recipe"),
        "empty": (folder(at / "empty"), "an empty folder"),
        "several": (at / "several", f"it holds 2 of them\nhint: give {at / 'several/a'} or {at / 'several/b'}"),
        "bert": (folder(at / "bert", weights, config=bert), "BertForMaskedLM is an encoder"),
        "t5": (folder(at / "t5", weights, config=t5), "T5ForConditionalGeneration is an encoder-decoder model"),
        "clip": (folder(at / "clip", weights, config={"model_type": "clip"}), "a model of images or sound"),
        "llava": (folder(at / "llava", weights, config={"model_type": "llava"}), "a vision-language model"),
        "diffusers": (folder(at / "sd", model_index={}), "a diffusers pipeline"),
        "unet": (folder(at / "unet", weights, config={"_class_name": "UNet2DConditionModel"}), "a part of a diffusers"),
        "embeddings": (
            folder(at / "st", weights, config=bert, modules=[]),
            "an encoder (config.json does not say is_decoder: true), packed for sentence-transformers",
        ),
        "onnx": (folder(at / "onnx", "model.onnx", config={}), "an ONNX model"),
        "mistral": (
            folder(at / "mistral", "consolidated.safetensors", params={}),
            "weights in their maker's own format",
        ),
        "tokenizer": (folder(at / "tok", tokenizer={}), "a tokenizer alone"),
        "mlx": (folder(at / "mlx", config=mlx), "already quantized (mlx, according to quantization of config.json)"),
        "url": ("https://huggingface.co/org/name/tree/main", "org/name"),
        "address": ("s3://bucket/model", "a web address"),
        "not an id": ("org/na me", "not a Hub id"),
        "broken config": (at / "broken", "config.json: not valid JSON"),
    }


@pytest.fixture
def wrong(tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    found = kinds(tmp_path)
    (folder(tmp_path / "broken", "model.safetensors") / "config.json").write_text("{")
    shutil.copy(MODEL / "model.safetensors", tmp_path / "mlx")
    return found


ONLY_CAUSAL = {"bert", "t5", "clip", "llava", "unet", "embeddings", "mlx"}  # inspect and verify judge these themselves


@pytest.mark.parametrize("verb", ["quantize", "plan", "eval", "generate", "bench", "inspect", "convert", "verify"])
def test_every_verb_names_the_wrong_input_at_once(
    tmp_path: Path, wrong: dict[str, tuple[Path | str, str]], verb: str
) -> None:
    out = str(tmp_path / "out")
    arguments = {
        "quantize": lambda path: ["quantize", "-r", "fp8-dynamic", "-m", path, "-o", out],
        "plan": lambda path: ["plan", "-r", "fp8-dynamic", "-m", path],
        "eval": lambda path: ["eval", path, "--text", str(MODEL / "eval.txt")],
        "generate": lambda path: ["generate", path, "--prompt", "def "],
        "bench": lambda path: ["bench", path],
        "inspect": lambda path: ["inspect", path],
        "convert": lambda path: ["convert", path, out, "--format", "awq"],
        "verify": lambda path: ["verify", path],
    }[verb]
    left_out = {"inspect": ONLY_CAUSAL, "convert": ONLY_CAUSAL, "verify": ONLY_CAUSAL | {"broken config"}}.get(
        verb, set()
    )
    if verb in ("inspect", "convert", "verify"):
        left_out = left_out | {"address", "not an id"}  # these take paths alone
    if verb in ("eval", "generate", "bench"):
        left_out = {"mlx"}  # a quantized model is fine
    names = [name for name in wrong if name not in left_out]
    for name, result in zip(names, run([arguments(str(wrong[name][0])) for name in names]), strict=True):
        assert result["code"] == 2, (name, result)
        assert wrong[name][1] in result["output"], (name, result["output"])
        assert result["output"].count("error: ") == 1, (name, result["output"])
        assert result["heavy"] == [], name
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_before_torch(tmp_path: Path) -> None:
    """The output, the device, the tokenizer, the text, an unfinished run: each in one message, nothing imported."""
    exists, finished, partial = tmp_path / "exists", tmp_path / "finished", tmp_path / "other.partial"
    for path in (exists, finished, partial):
        path.mkdir()
    (finished / "quantkit-report.json").write_text("{}")
    bare = folder(tmp_path / "bare")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, bare)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {MODEL}\nweights: {{bits: 4, group_size: 32}}\n")
    text = f"calibration={{data: {MODEL / 'calibration.txt'}}}"
    old = {"recipe": {"weights": {"group_size": 64}}, "versions": {"torch": "1.0"}, "device": "cuda"}
    (partial / "journal.jsonl").write_text(json.dumps(old) + "\n")
    (tmp_path / "model").mkdir()
    cases = {
        ("-o", str(exists)): "exists (an empty folder) and is never overwritten",
        ("-o", str(finished)): "exists (a finished quantkit run)",
        ("-o", "/proc/out"): "/proc/out cannot be made in /proc: that is no place for files\nhint: choose another",
        ("-o", str(recipe / "out")): "is a file, not a folder",
        ("-o", str(MODEL)): "exists",
        ("-o", str(MODEL / "out")): "lies in the model's own folder",
        ("-o", str(tmp_path / "o"), "--device", "gpu"): "no device is called 'gpu'\nhint: did you mean `cuda`?",
        ("-o", str(tmp_path / "o"), "--device", "cuda0"): "did you mean `cuda:0`?",
        ("-o", str(tmp_path / "o"), "-m", str(bare), "--set", text): "no tokenizer: neither tokenizer.json nor",
        ("-o", str(tmp_path / "o"), "--set", "calibration={data: nope.txt}"): "no file 'nope.txt'",
        ("-o", str(tmp_path / "other"), "--device", "cpu"): "weights.group_size: 64 -> 32",
        ("-o", str(tmp_path / "other"), "--device", "cpu", "-m", str(MODEL)): "device: cuda -> cpu",
    }
    for arguments, result in zip(cases, run([["quantize", "-r", str(recipe), *case] for case in cases]), strict=True):
        assert result["code"] == 2, (arguments, result)
        assert cases[arguments] in result["output"], (arguments, result["output"])
        assert result["heavy"] == [], arguments
    assert not (tmp_path / "o.partial").exists()


def test_a_gguf_is_refused_before_torch(tmp_path: Path) -> None:
    """By quantize and plan: architecture, settings, patterns, pre-tokenizers' names, sizes, importance matrices."""
    bare, other = tmp_path / "bare", tmp_path / "other"
    for path, model_type in ((bare, "llama"), (other, "olmo2")):
        path.mkdir()
        shutil.copy(MODEL / "model.safetensors", path)
        config = json.loads((MODEL / "config.json").read_text()) | {"model_type": model_type}
        (path / "config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.yaml").write_text("gguf: q4_k_m\ncalibration: null\n")
    cases = {
        ("-m", str(bare)): "no tokenizer: neither tokenizer.json nor",
        ("-m", str(other)): "model_type 'olmo2': not an architecture that quantkit writes as GGUF",
        ("--set", "gguf.tensor_types={attn_vv: q8_0}"): "'attn_vv' matches no tensor that can be quantized",
        ("--set", "gguf.tensor_types={attn_v: q8_k}"): "q8_k",
        ("--set", "gguf.mix=q4_k_x"): "no mix of GGUF's is named 'q4_k_x'; did you mean",
        ("--set", "gguf.mix=iq2_xxs"): "iq2_xxs is a mix of GGUF's that quantkit does not write",
        ("--set", "gguf.pre=lama3"): "llama.cpp has no pre-tokenizer of that name",
        ("--set", "gguf.mix={size: 100KB}", "--set", "calibration={}"): "are too few for this model",
        ("--set", "gguf.imatrix=nope.gguf"): "gguf.imatrix: nope.gguf: No such file",
        ("--set", f"gguf.imatrix={MODEL / 'model.safetensors'}"): "not an importance matrix",
    }
    given = ["-r", str(tmp_path / "recipe.yaml")]
    for verb in (["quantize", *given, "-o", str(tmp_path / "o")], ["plan", *given]):
        commands = [[*verb, *case, *([] if "-m" in case else ["-m", str(MODEL)])] for case in cases]
        for arguments, result in zip(cases, run(commands), strict=True):
            assert result["code"] == 2, (verb[0], arguments, result)
            assert cases[arguments] in result["output"], (verb[0], arguments, result["output"])
            assert result["heavy"] == [], (verb[0], arguments)
    assert not (tmp_path / "o.partial").exists()


def test_what_only_reads_headers_needs_no_torch(tmp_path: Path) -> None:
    """inspect and verify of whole folders, plain and quantized, and recipes."""
    name = "model.layers.0.self_attn.q_proj"
    group = {"targets": ["Linear"], "weights": weights(4, 32, symmetric=True)}
    packed_folder = write(tmp_path / "q", packed(name, 4, 2, symmetric=True), config({"a": group}, []))
    folders = [["inspect", str(packed_folder)], ["verify", str(packed_folder)], ["inspect", str(MODEL)]]
    for result in run([*folders, ["verify", str(MODEL)], ["recipes"], ["recipes", "show", "awq"]]):
        assert result["code"] == 0, result
        assert result["heavy"] == [], result
