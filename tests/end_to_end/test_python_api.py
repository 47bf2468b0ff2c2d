"""quantkit from Python: modules in memory, saving and loading, repeated runs, refusals in the command's words."""

import copy
import gc
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import quantkit
from quantkit import Recipe, Report, RunError, UserError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import DiskFullError
from quantkit.model.module_checkpoint import held_tensors
from quantkit.quantization.block_quantizer import BlockQuantizer
from quantkit.runtime.quant_linear import QuantLinear
from tests.tiny_models import CONFIGS, random_tokens, tiny_model

BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
RTN = {"weights": {"group_size": 16}}
GPTQ = {"weights": {"group_size": 16, "algorithm": "gptq"}, "calibration": {"data": "given as token ids"}}
MOE = {"weights": {"group_size": "channel", "bits": 8}}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made: what is left behind can be seen."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama").to(torch.bfloat16)


@pytest.fixture
def ids(model: PreTrainedModel) -> Tensor:
    return random_tokens(model, 3, 24, seed=1)


def tensors(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(folder)
    return {f"{name} {info.tag} {info.shape}": checkpoint.raw(name) for name, info in checkpoint.tensors.items()}


def contents(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits.float()


def quantized(model: PreTrainedModel, recipe: Any = RTN, *args: Any, **more: Any) -> tuple[Report, Any]:
    return quantkit.quantize_module(model, recipe, *args, progress=False, **more)


# A module in memory


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3", "qwen2", "opt", "gpt_neox", "mixtral"])
def test_a_module_gives_the_bytes_of_its_folder(name: str, tmp_path: Path, scratch: Path) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    model.config.dtype = None
    recipe = MOE if name == "mixtral" else {"weights": {"group_size": "channel"}}
    report, _ = quantized(model, recipe, tmp_path / "module")
    assert model.config.dtype is None
    model.config.dtype = config["dtype"]
    assert {**model.config.to_dict()} == config
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "source")
    twin = quantkit.quantize(tmp_path / "source", recipe, tmp_path / "folder", progress=False)
    assert tensors(tmp_path / "module") == tensors(tmp_path / "folder")
    assert contents(tmp_path / "module", but=("quantkit-report.json",)) == contents(
        tmp_path / "folder", but=("quantkit-report.json",)
    )
    assert report.model_fingerprint == twin.model_fingerprint
    assert not list(scratch.iterdir())


def test_gptq_of_a_module(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "source")
    quantized(model, GPTQ, tmp_path / "module", calibration=ids)
    quantkit.quantize(tmp_path / "source", GPTQ, tmp_path / "folder", calibration=ids, progress=False)
    assert tensors(tmp_path / "module") == tensors(tmp_path / "folder")


def test_weights_are_read_where_they_lie(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the model goes to the disk, and nothing is copied; where that cannot be, the log says where it is."""
    caplog.set_level(logging.INFO, "quantkit")
    held = held_tensors(model)
    assert isinstance(held, dict)
    where = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in held.values()} <= where
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", lambda *_, **__: pytest.fail("written to the disk"))
        quantized(model)
    assert not any("written" in record.getMessage() for record in caplog.records)
    monkeypatch.setattr("quantkit.model.module_checkpoint.held_tensors", lambda _: "of a test")
    quantized(model)
    told = [record.getMessage() for record in caplog.records if "of a test" in record.getMessage()]
    assert len(told) == 1
    assert "quantkit-source-" in told[0]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RunError, OSError])
def test_nothing_half_written_is_left(
    failure: type[BaseException], model: PreTrainedModel, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise failure("stopped")

    monkeypatch.setattr(BlockQuantizer, "quantize_block", fail)
    with pytest.raises(failure):
        quantized(model)
    assert not list(scratch.iterdir())


def test_errors_name_the_model_and_no_temporary_folder(model: PreTrainedModel, tmp_path: Path, scratch: Path) -> None:
    text = BUNDLED / "calibration.txt"
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("without a tokenizer.*\n.*tokenizer=", lambda: quantized(model, GPTQ | {"calibration": {"data": str(text)}})),
        ("group_size", lambda: quantized(model, {"weights": {"group_size": 11}})),
        ("matches no linear", lambda: quantized(model, RTN | {"overrides": [{"match": "re:.*porj", "skip": True}]})),
    ]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    cases.append(("up_proj.weight: 1 of", lambda: quantized(model)))
    for words, call in cases:
        with pytest.raises(UserError, match=f"(?s){words}") as failure:
            call()
        assert "quantkit-source" not in str(failure.value)
        assert str(scratch) not in str(failure.value)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("error", [UserError, RunError, DiskFullError])
def test_folders_in_errors_are_named_by_what_they_are(
    error: type[Exception], model: PreTrainedModel, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(blocks: BlockQuantizer, *_: Any) -> None:
        raise error(f"{blocks.run.streamed.checkpoint.folder}: damaged; {blocks.run.folder}: nothing in it")

    monkeypatch.setattr(BlockQuantizer, "quantize_block", fail)
    with pytest.raises(error) as failure:
        quantized(model)
    if error is DiskFullError:  # where room is needed is what the user must know
        assert f"{scratch}/quantkit-quantized-" in str(failure.value)
        assert "hint: pass output=, or set TMPDIR" in str(failure.value)
    else:
        assert str(failure.value) == "the model you passed: damaged; the result: nothing in it"


def data_given() -> dict[str, Callable[[Path], Any]]:
    text = (BUNDLED / "calibration.txt").read_text()
    texts = [text[start : start + 400] for start in range(0, 12_000, 400)]
    rows = torch.arange(3, 3 + 8 * 32).view(8, 32)

    def file(folder: Path) -> Path:
        (folder / "text.txt").write_text(text[:12_000])
        return folder / "text.txt"

    return {
        "path": file,
        "path as text": lambda folder: str(file(folder)),
        "name": lambda _: "general",
        "texts": lambda _: texts,
        "chats": lambda _: [[{"role": "user", "content": one}] for one in texts],
        "data set": lambda _: pytest.importorskip("datasets").Dataset.from_dict({"text": texts}),
        "tensor": lambda _: rows,
        "loader": lambda _: torch.utils.data.DataLoader([{"input_ids": row} for row in rows], batch_size=2),  # type: ignore[arg-type]
        "generator": lambda _: (row for row in rows),
    }


@pytest.mark.parametrize("kind", data_given())
def test_calibration_of_any_kind(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(4096)
    recipe = GPTQ | {"calibration": {"samples": 4, "seq_len": 32}}
    data = data_given()[kind](tmp_path)
    if kind == "chats":
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    else:
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    report, _ = quantized(model, recipe, calibration=data, tokenizer=tokenizer)
    assert report.calibration is not None
    assert (report.calibration.samples, report.calibration.seq_len) == (4, 32)
    assert len(report.calibration.sources) == 1
    assert report.calibration.sources[0].sha256
    again = Recipe(**report.recipe)
    if kind in ("path", "path as text", "name"):
        model.save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        twin = quantkit.quantize(tmp_path / "source", again, tmp_path / "twin", progress=False)
        assert twin.files == report.files
    else:  # it is nowhere to be read again, and nothing else is taken in its place
        with pytest.raises(UserError, match=r"given|token ids"):
            quantized(model, again, tokenizer=tokenizer)


# What comes back


def linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", ["quantkit.save", "save_pretrained"])
def test_saved_at_any_time(
    ran: bool, how: str, model: PreTrainedModel, ids: Tensor, tmp_path: Path, scratch: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    report, made = quantized(model, tokenizer=tokenizer)
    expected = logits(copy.deepcopy(made), ids)
    if ran:
        logits(made, ids)
        made.to(torch.float32)
    quantkit.save(made, tmp_path / "out") if how == "quantkit.save" else made.save_pretrained(tmp_path / "out")
    quantkit.quantize(model, RTN, tmp_path / "run", tokenizer=tokenizer, progress=False)
    but = ("quantkit-report.json",)
    assert contents(tmp_path / "out", but=but) == contents(tmp_path / "run", but=but)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert Report.load(tmp_path / "out") == report
    assert torch.equal(logits(quantkit.load(tmp_path / "out"), ids), expected)
    assert len(list(scratch.iterdir())) == 1
    del made
    assert not list(scratch.iterdir())


def test_copies_and_moves(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    _, made = quantized(model)
    expected = logits(made, ids)
    twin = copy.deepcopy(made)
    assert torch.equal(logits(twin, ids), expected)
    assert not {id(a) for a in linears(made)} & {id(a) for a in linears(twin)}
    assert torch.equal(logits(twin.to("cpu"), ids), expected)
    del made
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits(quantkit.load(tmp_path / "twin"), ids), expected)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(logits(again, ids), expected)
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "twin")


def test_a_copy_of_fused_experts_runs_its_own_weights(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    _, made = quantized(model, {"scheme": "W8A8"})
    ids = random_tokens(model, 2, 12)
    twin = copy.deepcopy(made)
    expected = logits(made, ids)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "experts" in name:
                parameter.zero_()
    assert not torch.equal(logits(made, ids), expected)
    assert torch.equal(logits(twin, ids), expected)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_a_loaded_folder_is_saved_as_it_is(scheme: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe = {"scheme": scheme} | ({"weights": {"group_size": 16}} if scheme == "W4A16_ASYM" else {})
    quantkit.quantize(model, recipe, tmp_path / "out", progress=False)
    loaded = quantkit.load(tmp_path / "out")
    logits(loaded, random_tokens(model, 2, 12))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    quantkit.save(loaded, tmp_path / "there")
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    (tmp_path / "there" / "notes.txt").unlink()
    assert contents(tmp_path / "there") == contents(tmp_path / "out")


def test_saving_is_refused(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantkit.quantize(model, RTN, tmp_path / "out", progress=False)
    made = quantkit.load(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds a model \(config.json\)"):
        quantkit.save(made, tmp_path / "out")
    with pytest.raises(UserError, match="max_shard_size"):
        made.save_pretrained(tmp_path / "new", max_shard_size="1GB")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        quantkit.save(made, tmp_path / "file")
    for wrong in (None, 5, ""):
        with pytest.raises(UserError, match="folder is"):
            quantkit.save(made, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a transformers model, got"):
        quantkit.save(nn.Linear(2, 2), tmp_path / "new")  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        copied: list[Any] = []

        def runs_out(*args: Any) -> None:
            copied.append(args)
            if len(copied) > 1:
                raise OSError(28, os.strerror(28))

        patch.setattr(shutil, "copyfile", runs_out)
        with pytest.raises(RunError, match="No space left"):
            quantkit.save(made, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "temporary"]
    with torch.no_grad():
        made.model.norm.weight.add_(1)
    with pytest.raises(UserError, match=r"model.norm.weight was changed"):
        quantkit.save(made, tmp_path / "new")
    whole = quantkit.load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="is gone since"):
        quantkit.save(whole, tmp_path / "new")


def test_a_plain_model_is_saved_by_transformers(model: PreTrainedModel, tmp_path: Path) -> None:
    quantkit.save(model, tmp_path / "plain")
    assert tensors(tmp_path / "plain").keys() == {f"{n} BF16 {tuple(t.shape)}" for n, t in held_tensors(model).items()}  # type: ignore[union-attr]
    quantkit.save(quantkit.load(tmp_path / "plain"), tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(tmp_path / "plain")


# A run again


def test_a_report_repeats_its_run(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.resize_token_embeddings(4096)
    model.save_pretrained("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, "model")
    shutil.copy(BUNDLED / "calibration.txt", "text.txt")
    section = {"data": "text.txt", "samples": 4, "seq_len": 32, "seed": 3}
    recipe = Recipe(
        model="model",
        **GPTQ | {"calibration": section, "overrides": [{"match": "re:.*v_proj", "weights": {"bits": 8}}]},
    )
    report = quantkit.quantize(None, recipe, "out", progress=False)
    assert Recipe(**report.recipe) == recipe
    assert report.model == "model"
    assert report.calibration is not None
    assert (report.calibration.samples, report.calibration.seq_len) == (4, 32)
    assert [source.name for source in report.calibration.sources] == ["text.txt"]
    assert Report.load("out") == Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    twin = quantkit.quantize(None, "out/quantkit-report.json", "twin", progress=False)
    assert twin.files == report.files
    assert twin.calibration == report.calibration
    assert contents(Path("twin"), but=("quantkit-report.json",)) == contents(Path("out"), but=("quantkit-report.json",))


def test_the_revision_of_a_hub_model(model: PreTrainedModel, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    model.save_pretrained(snapshot)
    report = quantkit.quantize(snapshot, RTN, tmp_path / "out", progress=False)
    assert report.model_revision == "0123abc"


def test_the_caller_s_settings_stay_as_they_are(model: PreTrainedModel, tmp_path: Path) -> None:
    def state() -> list[Any]:
        names = ("transformers", "datasets", "huggingface_hub", "quantkit", "")
        levels = [logging.getLogger(name).level for name in names]
        drawn, threads = torch.get_rng_state().tolist(), torch.get_num_threads()
        return [gc.isenabled(), drawn, torch.is_grad_enabled(), threads, levels]

    model.save_pretrained(tmp_path / "model")
    before = state()
    quantkit.plan(tmp_path / "model", RTN)
    quantkit.quantize(tmp_path / "model", RTN, tmp_path / "out", progress=False)
    quantkit.quantize_module(model, RTN, progress=False)
    quantkit.load(tmp_path / "out")
    assert state() == before


# Refusals


def test_arguments_of_the_wrong_kind(tmp_path: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path / "model")
    out, folder = tmp_path / "out", tmp_path / "model"
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(32))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    q: Any = quantkit
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("model is 123; expected", lambda: q.quantize(123, RTN, out)),
        ("no output folder", lambda: q.quantize(folder, RTN, None)),
        ("output is 5; expected a folder", lambda: q.quantize(folder, RTN, 5)),
        ("recipe is 5; expected the name", lambda: q.quantize(folder, 5, out)),
        ("recipe is None; expected the name", lambda: q.quantize(folder, None, out)),
        ("`awqq`", lambda: q.quantize(folder, "awqq", out)),
        ("wieghts: unknown key", lambda: q.quantize(folder, {"wieghts": {}}, out)),
        ("'gpu'\nhint: did you mean `cuda`", lambda: q.quantize(folder, RTN, out, device="gpu")),
        ("progress is 'loud'", lambda: q.quantize(folder, RTN, out, progress="loud")),
        ("tokenizer= is for a module", lambda: q.quantize(folder, RTN, out, tokenizer=1)),
        ("nowhere", lambda: q.quantize(tmp_path / "nowhere", RTN, out)),
        ("no model", lambda: q.quantize(None, RTN, out)),
        ("exists", lambda: q.quantize(folder, RTN, folder)),
        ("a Linear, not a transformers model", lambda: q.quantize_module(nn.Linear(2, 2), RTN)),
        ("not a transformers model", lambda: q.quantize_module(str(folder), RTN)),
        ("pass model._orig_mod", lambda: q.quantize_module(torch.compile(model), RTN)),
        ("meta device", lambda: q.quantize_module(copy.deepcopy(model).to("meta"), RTN)),
        ("tokenizer is 5", lambda: q.quantize_module(model, RTN, tokenizer=5)),
        ("path is 5; expected a model folder", lambda: q.load(5)),
        ("nowhere", lambda: q.load(tmp_path / "nowhere")),
        ("dtype is 'int3'", lambda: q.load(folder, dtype="int3")),
        ("did you mean `cuda`", lambda: q.load(folder, device="gpu")),
        ("path is None", lambda: q.verify(None)),
        ("vlm", lambda: q.verify(folder, "vlm")),
        ("nowhere", lambda: q.verify(tmp_path / "nowhere")),
        ("GGUF", lambda: q.verify(tmp_path / "model.gguf")),
        ("LoRA", lambda: q.verify(tmp_path / "lora")),
        ("path is 5", lambda: q.inspect(5)),
        ("nowhere", lambda: q.inspect(tmp_path / "nowhere")),
        ("source is None", lambda: q.convert(None, out, "awq")),
        ("not quantized", lambda: q.convert(folder, out, "awq")),
        ("format", lambda: q.convert(folder, out, "akw")),
        ("recipe is 5", lambda: q.plan(folder, 5)),
        ("nowhere", lambda: q.plan(tmp_path / "nowhere", RTN)),
        ("model is 5", lambda: q.plan(5, RTN)),
    ]
    for words, call in cases:
        with pytest.raises(UserError) as failure:
            call()
        assert words in str(failure.value), f"{words!r} is not in: {failure.value}"
        assert "pydantic" not in str(failure.value)
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_help_names_each_function_as_it_is_called() -> None:
    for name in quantkit.__all__:
        assert getattr(getattr(quantkit, name), "__name__", name) == name


def test_home_folders_and_bytes_like_paths(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_pretrained(tmp_path / "model")
    quantkit.quantize("~/model", RTN, "~/out", progress=False)
    assert (tmp_path / "out" / "config.json").exists()
    assert quantkit.verify("~/out").verdict == quantkit.verify(tmp_path / "out").verdict
    assert quantkit.inspect("~/out")["format"]
    quantkit.convert("~/out", "~/converted", "gptq")
    quantkit.save(quantkit.load("~/out"), "~/saved")
    assert tensors(tmp_path / "saved") == tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"weights": {"bits": "4"}}, "weights.bits: must be a whole number"),
        ({"wieghts": {}}, "did you mean 'weights'"),
        ({"weights": {"bits": 9}, "transforms": ["awqq"]}, "(?s)awqq.*at most 8"),
        ({"model": 3}, "model: must be text"),
    ],
)
def test_a_recipe_that_is_wrong(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as failure:
        Recipe(**data)
    assert "pydantic" not in str(failure.value)
    assert failure.value.__context__ is None


def test_recipes_are_values() -> None:
    recipe = Recipe(**GPTQ)
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe == Recipe(**recipe.resolved())


def test_quantized_models_are_not_quantized_again(model: PreTrainedModel) -> None:
    _, made = quantized(model)
    with pytest.raises(UserError, match="already quantized"):
        quantized(made)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_read_where_it_lies(name: str, tmp_path: Path) -> None:
    """Experts are saved one by one: their tensors are parts of one parameter."""
    model = tiny_model(name)
    held = held_tensors(model)
    assert isinstance(held, dict), held
    model.save_pretrained(tmp_path / "source")
    stored = Checkpoint.open(tmp_path / "source")
    assert sorted(held) == sorted(stored.tensors)
    assert all(torch.equal(tensor, stored.read(key)) for key, tensor in held.items())
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.state_dict().values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in held.values()} <= ours


def test_verify_refuses_what_the_command_refuses(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    for name, words in (("lora", "adapter"), ("m.gguf", "GGUF"), ("nope", "no such folder")):
        with pytest.raises(UserError, match=words):
            quantkit.verify(tmp_path / name)
