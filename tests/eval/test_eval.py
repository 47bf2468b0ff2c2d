"""Evaluation: figures against plain loops in float64, intervals against brute force, and every refusal."""

import json
import math
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from quantkit_eval import TABLE_HEADER, bootstrap, divergence, evaluate, perplexity, render, table_row
from quantkit_eval.divergence import compare, kl_divergence
from quantkit_eval.perplexity import cut, read_text, token_losses
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.errors import RunError, UserError

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
CONTEXT = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 1,400 tokens with characters of several bytes, not a whole number of windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    content = (MODEL / "eval.txt").read_text(encoding="utf-8")
    path.write_text("# Grüße, 世界\n" + content[4000:9000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with noise on its matrices: something like a quantized one, without a quantizer."""
    path = tmp_path_factory.mktemp("noisy") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for name, p in model.named_parameters():
        if "proj" in name:
            p.data += 0.3 * p.data.std() * torch.randn_like(p)
    model.save_pretrained(path)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def plain(text: Path, noisy: Path) -> dict[str, torch.Tensor]:
    """ids [W, T] and both models' float64 log-probabilities [W, P, V], one window at a time, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(text.read_bytes().decode(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    assert len(ids) % CONTEXT  # so that a tail is dropped
    found = {"ids": windows}
    for name, path in (("model", noisy), ("reference", MODEL)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = torch.cat([model(window[None]).logits[:, :-1] for window in windows])
        found[name] = logits.double().log_softmax(-1)
    return found


@pytest.fixture(scope="module")
def result(text: Path, noisy: Path) -> dict:
    return evaluate(noisy, ref=MODEL, text=text, context=CONTEXT, progress=False)


def test_perplexity_is_that_of_a_plain_loop(result: dict, plain: dict[str, torch.Tensor], text: Path) -> None:
    targets = plain["ids"][:, 1:, None]
    for got, name in ((result, "model"), (result["reference"], "reference")):
        loss = -plain[name].gather(-1, targets).mean().item()
        assert got["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-4)
        used = plain["ids"].flatten().tolist()
        size = len(AutoTokenizer.from_pretrained(MODEL).decode(used).encode())
        assert got["bits_per_byte"]["value"] == pytest.approx(loss / math.log(2) * len(used) / size, rel=1e-4)
    alone = evaluate(MODEL, text=text, context=CONTEXT, batch_size=3, progress=False)
    assert alone["perplexity"]["value"] == pytest.approx(result["reference"]["perplexity"]["value"], rel=1e-5)
    assert alone["tokens"] == plain["ids"][:, 1:].numel()
    assert alone["windows"] == len(plain["ids"])


def test_divergence_is_that_of_a_plain_loop(result: dict, plain: dict[str, torch.Tensor]) -> None:
    log_q, log_p, targets = plain["model"], plain["reference"], plain["ids"][:, 1:]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result["kl"]["mean"]["value"] == pytest.approx(kl.mean().item(), rel=1e-4)
    p99 = np.quantile(kl.numpy(), 0.99, method="inverted_cdf")
    assert result["kl"]["p99"]["value"] == pytest.approx(p99, rel=1e-3)
    guess, reference_guess = log_q.argmax(-1), log_p.argmax(-1)
    right, reference_right = guess == targets, reference_guess == targets
    assert result["top1_agreement"]["value"] == pytest.approx((guess == reference_guess).double().mean().item())
    lost = (reference_right & ~right).double().mean().item()
    gained = (right & ~reference_right).double().mean().item()
    assert lost != gained
    assert result["flips"]["right_to_wrong"]["value"] == pytest.approx(lost)
    assert result["flips"]["wrong_to_right"]["value"] == pytest.approx(gained)
    assert result["flips"]["rate"]["value"] == pytest.approx(lost + gained)
    ratio = result["perplexity"]["value"] / result["reference"]["perplexity"]["value"]
    assert result["perplexity_ratio"]["value"] == pytest.approx(ratio)


def test_a_model_does_not_differ_from_itself(text: Path) -> None:
    result = evaluate(MODEL, ref=MODEL, text=text, context=CONTEXT, max_tokens=300, progress=False)
    assert result["windows"] == 300 // CONTEXT
    assert result["kl"]["mean"] == {"value": 0, "low": 0, "high": 0}
    assert result["top1_agreement"]["value"] == 1
    assert result["flips"]["rate"]["value"] == 0


def test_batches_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (4 * torch.randn(3, 9, 50, generator=generator) for _ in range(2))
    ids = torch.randint(50, (3, 9), generator=generator)
    whole, losses = compare(logits, reference, ids), token_losses(logits, ids)
    monkeypatch.setattr(perplexity, "CHUNK_BYTES", 3 * 50 * 4)  # three rows at a time
    assert len(divergence.chunks(logits)) == 9
    pieces, pieces_losses = compare(logits, reference, ids), token_losses(logits, ids)
    for field in ("loss", "reference_loss", "kl", "agree", "right", "reference_right"):
        assert torch.equal(getattr(whole, field), getattr(pieces, field)), field
    assert all(torch.equal(a, b) for a, b in zip(losses, pieces_losses, strict=True))
    torch.testing.assert_close(whole.loss, losses[0])
    assert torch.equal(whole.right, losses[1])


def test_kl_of_masked_tokens() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0]]).log()  # -inf in both: adds nothing
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(log_p, log_q).item() == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(log_p, log_p).item() == 0


def test_intervals_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(1)
    values_WP = generator.lognormal(size=(20, 30)) * generator.lognormal(size=(20, 1))
    counts_SW = bootstrap.draw(20, seed=3, resamples=200)
    assert counts_SW.shape == (200, 20)
    assert (counts_SW.sum(1) == 20).all()
    resamples = [np.repeat(values_WP, counts, axis=0) for counts in counts_SW]
    for got, statistic in (
        (bootstrap.mean(values_WP.mean(1), counts_SW), np.mean),
        *(
            (bootstrap.quantile(values_WP, counts_SW, q), lambda v, q=q: np.quantile(v, q, method="inverted_cdf"))
            for q in (0.99, 0.5, 0.9)
        ),
    ):
        low, high = np.quantile([statistic(sample) for sample in resamples], [0.025, 0.975])
        assert got["value"] == pytest.approx(statistic(values_WP))
        assert (got["low"], got["high"]) == pytest.approx((low, high))


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap.mean(generator.normal(size=100), bootstrap.draw(100, trial, 300))
        covered += interval["low"] <= 0 <= interval["high"]
    assert 0.88 < covered / 200 <= 0.99


def test_draws_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap.draw(7, seed=1, resamples=50)
    monkeypatch.setattr(bootstrap, "CELLS", 7 * 8)
    assert np.array_equal(whole, bootstrap.draw(7, seed=1, resamples=50))


def test_result_is_json_and_says_what_was_measured(result: dict, noisy: Path, text: Path) -> None:
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again == result
    assert again["text"]["sha256"] == read_text(text).sha256
    assert {"torch", "transformers", "python"} <= again["versions"].keys()
    for interval in (result["perplexity"], result["kl"]["mean"], result["kl"]["p99"], result["flips"]["rate"]):
        assert interval["low"] < interval["value"] < interval["high"] or interval is result["kl"]["p99"]
    repeated = evaluate(noisy, ref=MODEL, text=text, context=CONTEXT, progress=False)
    assert {k: v for k, v in repeated.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_rendering(result: dict) -> None:
    console = Console(record=True, width=120, file=StringIO())
    render(result, console)
    shown = console.export_text()
    for label in ("perplexity", "bits per byte", "KL(original || this)", "top-1 agreement", "right to wrong"):
        assert label in shown
    assert f"{result['perplexity']['value']:.3f}" in shown
    row = table_row(result, "noisy")
    assert row.count("|") == TABLE_HEADER.splitlines()[0].count("|")
    alone = {k: v for k, v in result.items() if k not in ("kl", "flips", "top1_agreement", "reference")}
    render(alone, console)
    assert "KL" not in console.export_text()
    assert table_row(alone).count("|") == row.count("|")


def test_text_refusals(tmp_path: Path) -> None:
    for content, message in (
        (b"", "empty"),
        (b" \n", "empty"),
        (b"abc \xff\xfe", r"not UTF-8 text \(byte 4"),
        (b"too short", r"too short: \d+ tokens, but two windows of 64 need 128"),
    ):
        file = tmp_path / "text.txt"
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            evaluate(MODEL, text=file, context=CONTEXT)
    with pytest.raises(UserError, match="no such text file"):
        evaluate(MODEL, text=tmp_path / "absent.txt")
    with pytest.raises(UserError, match="is a folder"):
        evaluate(MODEL, text=tmp_path)


def test_model_refusals(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        evaluate(tmp_path / "absent", text=text)
    with pytest.raises(UserError, match=r"no config\.json"):
        evaluate(tmp_path, text=text)
    with pytest.raises(UserError, match="context 1025 is longer than the 1024 positions"):
        evaluate(MODEL, text=MODEL / "eval.txt", context=1025)
    with pytest.raises(UserError, match="at least 2"):
        evaluate(MODEL, text=text, context=1)
    with pytest.raises(UserError, match="batch_size"):
        evaluate(MODEL, text=text, context=CONTEXT, batch_size=0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        evaluate(tmp_path, text=text)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, tmp_path)
    with pytest.raises(UserError, match="no weights"):
        evaluate(tmp_path, text=text, context=CONTEXT)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        evaluate(tmp_path, text=text, context=CONTEXT)


def test_missing_weights_are_not_made_up(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(MODEL, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing.*up_proj"):
        evaluate(folder, text=text, context=CONTEXT)


def test_nan_is_a_failed_run(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(MODEL, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="NaN or Inf in the logits"):
        evaluate(folder, text=text, context=CONTEXT)


def test_tokenizers_must_be_the_same(tmp_path: Path, text: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]  # the same vocabulary, used otherwise
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match="cut this text differently"):
        evaluate(folder, ref=MODEL, text=text, context=CONTEXT)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match="different vocabularies"):
        evaluate(folder, ref=MODEL, text=text, context=CONTEXT)


def test_cut_needs_no_fast_tokenizer(text: Path) -> None:
    fast = AutoTokenizer.from_pretrained(MODEL)

    class Slow:
        is_fast = False

        def __call__(self, content: str, **options: object) -> dict[str, list[int]]:
            assert not options.pop("return_offsets_mapping")
            return {"input_ids": fast(content, **options)["input_ids"]}

    source = read_text(text)
    slow, quick = cut(source, Slow(), CONTEXT), cut(source, fast, CONTEXT)
    assert torch.equal(slow.ids_WT, quick.ids_WT)
    assert slow.bytes_per_token == pytest.approx(quick.bytes_per_token, rel=0.05)
