"""Evaluation of modules in memory, and the Trainer's callback: it measures, and training goes on as if it had not."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantkit_eval import QuantizedEvaluation, evaluate, training
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import quantkit
from quantkit.errors import UserError

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny-llama"
TEXT = (BUNDLED / "eval.txt").read_text()[:6000]
RTN = {"weights": {"bits": 4, "group_size": 16, "algorithm": {"rtn": {"range": "minmax"}}}}
SHORT: dict[str, Any] = {"context": 32, "tokens": 256}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


def small_model(tokenizer: Any) -> PreTrainedModel:
    """One layer, with dropout: its training draws random numbers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.3,
            max_position_embeddings=64,
        )
    )


# Modules in memory


def test_a_module_gives_the_figures_of_its_folder(tmp_path: Path, tokenizer: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    quantkit.quantize(BUNDLED, RTN, tmp_path / "q", progress=False)
    expected = evaluate(tmp_path / "q", ref=BUNDLED, text=text, device="cpu", progress=False, **SHORT)
    made, original = (quantkit.load(folder, dtype=torch.float32, device="cpu") for folder in (tmp_path / "q", BUNDLED))
    for model, ref in ((made, original), (made, BUNDLED), (tmp_path / "q", original)):
        found = quantkit.evaluate(model, ref=ref, text=TEXT, tokenizer=tokenizer, progress=False, **SHORT)
        assert found.texts[0].divergence == expected.texts[0].divergence
    alone = quantkit.evaluate(original, text=TEXT, progress=False, **SHORT)  # the folder it came from has a tokenizer
    assert alone.ref is None
    assert alone.texts[0].model == expected.texts[0].divergence.reference  # type: ignore[union-attr]


def test_a_module_is_left_as_it_was(tokenizer: Any) -> None:
    model = small_model(tokenizer).train()
    model.model.norm.eval()  # frozen by its owner
    modes = [part.training for part in model.modules()]
    first, second = (evaluate(model, text=TEXT, tokenizer=tokenizer, progress=False, **SHORT) for _ in range(2))
    assert first.texts == second.texts  # without dropout
    assert [part.training for part in model.modules()] == modes
    model(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss.backward()


def test_modes_come_back_after_a_failure(tokenizer: Any) -> None:
    model = small_model(tokenizer).train()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(quantkit.RunError, match="NaN"):
        evaluate(model, text=TEXT, tokenizer=tokenizer, progress=False, **SHORT)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "without a tokenizer.*\nhint: pass tokenizer="),
        ({"tokenizer": 5}, "tokenizer is a int; expected"),
        ({"engine": "paged"}, "engine= is for folders"),
        ({"kv_cache": "int8"}, "kv_cache= is for folders"),
        ({"context": 128}, "context 128 is longer than the 64 positions"),
        ({"text": []}, "no text"),
        ({"text": 5}, "text: found int"),
        ({"device": "meta"}, "no device is called 'meta'"),
    ],
)
def test_mistakes(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        evaluate(small_model(tokenizer), progress=False, **{"text": TEXT, "context": 32} | options)


def test_what_is_no_language_model(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="model is a Linear, not a model of transformers"):
        evaluate(torch.nn.Linear(2, 2), text=TEXT)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"hint: pass ref.module"):
        evaluate(small_model(tokenizer), ref=torch.nn.DataParallel(small_model(tokenizer)), text=TEXT, context=8)  # type: ignore[arg-type]


def test_a_reference_with_another_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    other = AutoTokenizer.from_pretrained(BUNDLED)
    other.add_tokens(["<another>"])
    small_model(tokenizer).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    model = small_model(tokenizer)
    for pair in ({"model": model, "ref": tmp_path}, {"model": tmp_path, "ref": model}):
        with pytest.raises(UserError, match="different vocabularies: KL would mean nothing"):
            evaluate(**pair, text=TEXT, tokenizer=tokenizer, progress=False, **SHORT)


# The callback


class Watch(TrainerCallback):
    """A tracker: sees what the Trainer logs, as those that report_to names do. Draws from every random generator."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.drawn: list[tuple[float, float, float]] = []
        self.modes: list[bool] = []

    def on_log(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        self.logs.append(dict(found["logs"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
        self.modes.append(all(part.training for part in found["model"].modules()))


def trained(folder: Path, tokenizer: Any, callbacks: list[Any], steps: int = 4) -> tuple[Trainer, Watch]:
    random.seed(0)
    np.random.seed(0)
    watch, model = Watch(), small_model(tokenizer)
    ids = tokenizer(TEXT, verbose=False)["input_ids"][: 16 * 24]
    rows = [{"input_ids": ids[i : i + 16], "labels": ids[i : i + 16]} for i in range(0, len(ids), 16)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, logging_steps=2, report_to="none", learning_rate=1e-2, seed=1,
        per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[watch, *callbacks])  # type: ignore[arg-type]
    trainer.train()
    return trainer, watch


def state_of(value: Any) -> Any:
    """Tensors of a nested state, as bytes."""
    if isinstance(value, Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: state_of(each) for key, each in value.items()}
    return [state_of(each) for each in value] if isinstance(value, list | tuple) else value


def test_training_goes_on_as_if_nothing_had_been_measured(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(*arguments: Any, **options: Any) -> Any:
        """Quantizes as ever, and draws as some recipe, tokenizer or model of its own code may."""
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        return quantkit.quantize_module(*arguments, **options)

    monkeypatch.setattr(training, "quantize_module", drawing)
    callback = QuantizedEvaluation(RTN, TEXT, every=2, **SHORT)
    plain, without = trained(tmp_path / "without", tokenizer, [])
    measured, watched = trained(tmp_path / "with", tokenizer, [callback])
    assert plain.model is not None
    assert measured.model is not None
    assert state_of(plain.model.state_dict()) == state_of(measured.model.state_dict())
    assert without.drawn == watched.drawn
    assert all(watched.modes)
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        first, second = (
            torch.load(tmp_path / name / "checkpoint-4" / file, weights_only=False) for name in ("without", "with")
        )
        if file == "rng_state.pth":
            first["numpy"], second["numpy"] = (str(each["numpy"]) for each in (first, second))
        assert state_of(first) == state_of(second), file
    rows = [row for row in measured.state.log_history if "eval_quantized_kl" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert [row for row in watched.logs if "eval_quantized_kl" in row] == [
        {key: value for key, value in row.items() if key != "step"} for row in rows
    ]
    others = [row for row in measured.state.log_history if "eval_quantized_kl" not in row]
    assert [row.get("loss") for row in others] == [row.get("loss") for row in plain.state.log_history]


def test_the_figures_are_those_of_the_model_at_the_save(tmp_path: Path, tokenizer: Any) -> None:
    trainer, _ = trained(tmp_path / "run", tokenizer, [QuantizedEvaluation(RTN, TEXT, every=2, **SHORT)], 2)
    (row,) = (row for row in trainer.state.log_history if "eval_quantized_kl" in row)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2", dtype=torch.float32)
    _, made = quantkit.quantize_module(saved, RTN, progress=False)
    found = evaluate(made, ref=saved, text=TEXT, tokenizer=tokenizer, progress=False, **SHORT).texts[0]
    assert found.divergence is not None
    assert row["eval_quantized_kl"] == found.divergence.kl_mean.value > 0
    assert row["eval_quantized_perplexity"] == found.model.perplexity.value
    assert row["eval_perplexity"] == found.divergence.reference.perplexity.value


def test_gptq_calibrates_on_what_is_given(tokenizer: Any) -> None:
    recipe = {"weights": {"group_size": 16, "algorithm": "gptq"}, "calibration": {"samples": 2, "seq_len": 16}}
    model = small_model(tokenizer).train()
    before = torch.get_rng_state()
    callback = QuantizedEvaluation(recipe, TEXT, calibration=[TEXT[:3000]], **SHORT)
    assert callback.measure(model, tokenizer)["eval_quantized_kl"] > 0
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_a_failed_measurement_ends_no_training(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise quantkit.RunError("no room")

    monkeypatch.setattr(training, "quantize_module", fail)
    trainer, _ = trained(tmp_path / "run", tokenizer, [QuantizedEvaluation(RTN, TEXT, **SHORT)], 2)
    assert trainer.state.global_step == 2
    assert "step 1: the quantized copy was not measured: no room" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gptq-w4a61", TEXT), "gptq-w4a16"),
        ((RTN, "no-such.txt"), "no such text file"),
        ((RTN, TEXT, 0), "every is 0"),
        ((RTN, TEXT, -1), "every is -1"),
        (({"weights": {"bitz": 4}}, TEXT), "bitz"),
    ],
)
def test_a_callback_that_cannot_work_is_refused_at_once(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantizedEvaluation(*arguments)
