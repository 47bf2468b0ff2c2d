"""What a GGUF cannot hold is refused before any work, by quantize and by plan: nothing is read but names and JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import quantkit
from quantkit.checkpoint.gguf_file import read_gguf
from quantkit.cli.main import app
from quantkit.formats.gguf import tokenizer, vocabulary
from quantkit.planner import estimate as planner
from quantkit.quantization import pipeline
from tests.end_to_end.test_gguf import run, tiny
from tests.tiny_models import tiny_model

MIX: dict[str, Any] = {"gguf": "q4_k_m", "calibration": {}}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny("llama", tmp_path / "model", monkeypatch)


def unknown_pre(folder: Path) -> None:
    """Cuts at every single digit pair, as nothing in llama.cpp does."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{2}|[^\p{N}]"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (folder / "tokenizer.json").write_text(json.dumps(whole))


def word_piece(folder: Path) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))


def unigram(folder: Path) -> None:
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(folder / "tokenizer.json"))


def too_many(folder: Path) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["vocab"]["\u00e9\u00e9\u00e9\u00e9"] = 4096
    (folder / "tokenizer.json").write_text(json.dumps(whole))


def broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def without(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def setting(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def olmo(folder: Path) -> None:
    tiny_model("olmo2").save_pretrained(folder)


def nothing(folder: Path) -> None:
    pass


# name -> (what becomes of the model's folder, the recipe, what the message says)
CASES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "pre": (unknown_pre, MIX, "cuts texts as no pre-tokenizer of llama.cpp does"),
    "word pieces": (word_piece, MIX, "a tokenizer of the kind WordPiece is not supported"),
    "unigram": (unigram, MIX, "a tokenizer of the kind Unigram is not supported"),
    "rows": (too_many, MIX, "tokens up to id 4096, the model 4096 rows"),
    "broken tokenizer": (broken, MIX, "tokenizer.json"),
    "pre name": (nothing, MIX | {"gguf": {"mix": "q4_0", "pre": "lama-bpe"}}, "did you mean `llama-bpe`?"),
    "architecture": (olmo, MIX, "model_type 'olmo2': not an architecture"),
    "setting": (setting(hidden_act="relu"), MIX, "`hidden_act: relu` has no place"),
    "rope": (setting(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), MIX, "rope_type: dynamic"),
    "pattern": (
        nothing,
        MIX | {"gguf": {"mix": "q4_0", "tensor_types": {"attn_vv": "q8_0"}}},
        "'attn_vv' matches no tensor that can be quantized\nhint: did you mean `attn_v`?",
    ),
    "size": (nothing, MIX | {"gguf": {"mix": {"size": "9KB"}}}, "too few for this model"),
    "imatrix": (nothing, MIX | {"gguf": {"mix": "q4_0", "imatrix": "nope.gguf"}}, "nope.gguf: No such file"),
}


def unused(*_: Any, **__: Any) -> None:
    raise AssertionError("the calibration text was read")


@pytest.mark.parametrize("verb", ["quantize", "plan", "plan by config.json"])
@pytest.mark.parametrize("case", CASES)
def test_refused_before_any_work(
    case: str, verb: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, recipe, message = CASES[case]
    change(model)
    monkeypatch.setattr(pipeline, "token_batches", unused)
    monkeypatch.setattr(pipeline, "trace_all", unused)
    monkeypatch.setattr(planner, "calibration_size", unused)
    if verb == "plan by config.json":
        (model / "model.safetensors").unlink()
    with pytest.raises(quantkit.UserError) as caught:
        run(model, tmp_path / "out", recipe) if verb == "quantize" else quantkit.plan(model, recipe)
    assert message in str(caught.value), str(caught.value)
    assert str(caught.value).count("\nhint: ") == 1, str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("recipe", [{"gguf": "q4_0", "calibration": None}, {"gguf": "q4_0", "calibration": {}}])
def test_a_run_without_a_tokenizer(recipe: dict[str, Any], model: Path, tmp_path: Path) -> None:
    without(model)
    with pytest.raises(quantkit.UserError, match="no tokenizer"):
        quantkit.quantize(model, recipe, tmp_path / "out", device="cpu", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_what_the_recipe_overrules(model: Path, tmp_path: Path) -> None:
    """`pre` is written as given, whatever the tokenizer does."""
    unknown_pre(model)
    recipe = {"gguf": {"mix": "q4_0", "pre": "llama-bpe"}, "calibration": None}
    assert quantkit.plan(model, recipe).types
    quantkit.quantize(model, recipe, tmp_path / "out", device="cpu", progress=False)
    assert (tmp_path / "out/model.gguf").exists()


def test_plan_needs_no_tokenizer_in_the_folder(model: Path) -> None:
    for path in model.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert quantkit.plan(model, {"gguf": "q4_0", "calibration": None}).types


@pytest.mark.parametrize("recipe", [{"transforms": ["rotation"], "calibration": {}}, {"calibration": None}])
def test_patterns_find_the_head_that_a_rotation_unties(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama-tied", tmp_path / "model", monkeypatch)
    whole = recipe | {"gguf": {"mix": "q4_0", "tensor_types": {"^output\\.weight": "q8_0"}}}
    if "transforms" in recipe:
        run(model, tmp_path / "out", whole)
        assert quantkit.plan(model, whole).types
    else:
        with pytest.raises(quantkit.UserError, match="matches no tensor"):
            quantkit.plan(model, whole)


def test_transformers_loads_the_tokenizer_once_in_a_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones take seconds: the keys that judge it are those that are written."""
    loaded: list[Path] = []
    original = vocabulary.locate_tokenizer

    def load(folder: Path, **options: Any) -> Any:
        loaded.append(folder)
        return original(folder, **options)

    monkeypatch.setattr(vocabulary, "locate_tokenizer", load)
    quantkit.quantize(model, {"gguf": "q4_0", "calibration": None}, tmp_path / "out", device="cpu", progress=False)
    assert len(loaded) == 1
    tokenizer.check_tokenizer(model, 4096)
    assert len(loaded) == 1


def test_what_the_file_lacks_is_said_by_every_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding window that llama.cpp does not compute, tensors without a place: in plan, in the reports, on screen."""
    model = tiny("mistral-window", tmp_path / "model", monkeypatch)
    tensors = load_file(model / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(tensors | extra, model / "model.safetensors", {"format": "pt"})
    recipe = {"gguf": "q4_0", "calibration": None}
    window = "llama.cpp computes no sliding window for llama: the file's context is the window, 256 tokens, not 512"
    lost = "not in the file: model.layers.0.self_attn.rotary_emb.inv_freq and 1 more: computed from config.json"
    assert {window, lost} <= set(quantkit.plan(model, recipe).warnings)
    report = quantkit.quantize(model, recipe, tmp_path / "out", device="cpu", progress=False)
    assert {window, lost} <= set(report.warnings)
    assert {window, lost} <= set(quantkit.convert(model, tmp_path / "f.gguf", requantize="q8_0").notes)
    file = tmp_path / "recipe.yaml"
    file.write_text("gguf: q8_0\n")
    for arguments in (
        ["quantize", str(model), "-r", str(file), "-o", str(tmp_path / "other")],
        ["convert", str(model), str(tmp_path / "g.gguf"), "--requantize", "q8_0"],
        ["plan", str(model), "-r", str(file)],
    ):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
        assert window in " ".join(result.output.split()), (arguments, result.output)


def test_a_name_that_llama_cpp_would_take_for_phi3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By quantize and convert: llama.cpp would not load the file by the folder's name. The report says so."""
    model = tiny("llama", tmp_path / "tiny-Phi-3", monkeypatch)
    report = quantkit.quantize(
        model, {"gguf": "q4_0", "calibration": None}, tmp_path / "o", device="cpu", progress=False
    )
    notes = quantkit.convert(model, tmp_path / "f.gguf", requantize="q8_0").notes
    for path, said in ((tmp_path / "o/model.gguf", report.warnings), (tmp_path / "f.gguf", notes)):
        assert read_gguf(path).metadata["general.name"] == "tiny-Phi_3"
        assert any(line.startswith("general.name is 'tiny-Phi_3': by 'tiny-Phi-3', llama.cpp would") for line in said)


def test_a_module_becomes_a_file_and_its_decoded_model(tmp_path: Path) -> None:
    """A file needs a folder and a tokenizer: said before any work. The module that comes back is the file's."""
    bundled = Path(__file__).parents[2] / "examples/tiny-llama"
    module = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    recipe = {"gguf": "q4_0", "calibration": None}
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": tokenizer}, "output=FOLDER"),
        ({"output": tmp_path / "o"}, "tokenizer="),
    ]
    for options, hint in cases:
        with pytest.raises(quantkit.UserError, match=f"hint: pass {hint}"):
            quantkit.quantize_module(module, recipe, progress=False, device="cpu", **options)
    report, made = quantkit.quantize_module(
        module, recipe, tmp_path / "o", tokenizer=tokenizer, progress=False, device="cpu"
    )
    assert report.gguf is not None
    weight = made.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(weight, quantkit.load(tmp_path / "o").get_parameter("model.layers.0.mlp.down_proj.weight"))
    assert not torch.equal(weight, module.get_parameter("model.layers.0.mlp.down_proj.weight"))
