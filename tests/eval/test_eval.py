"""Evaluation: figures against plain loops in float64, intervals against brute force, and every refusal."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantkit_eval import TABLE_HEADER, bootstrap, divergence, evaluate, perplexity, render, table_row
from quantkit_eval.cached_model import CachedModel
from quantkit_eval.divergence import compare, kl_divergence
from quantkit_eval.perplexity import cut, token_losses
from quantkit_eval.results import Divergence, Evaluation, Interval, TextResult
from quantkit_eval.texts import read_text
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from quantkit.cache_spec import CacheSpec
from quantkit.errors import RunError, UserError
from quantkit.types import KVSpec

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
def evaluation(text: Path, noisy: Path) -> Evaluation:
    return evaluate(noisy, ref=MODEL, text=text, context=CONTEXT, progress=False)


@pytest.fixture(scope="module")
def result(evaluation: Evaluation) -> TextResult:
    (only,) = evaluation.texts
    return only


@pytest.fixture(scope="module")
def divergence_(result: TextResult) -> Divergence:
    assert result.divergence is not None
    return result.divergence


def test_perplexity_is_that_of_a_plain_loop(
    result: TextResult,
    divergence_: Divergence,
    plain: dict[str, torch.Tensor],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = plain["ids"][:, 1:, None]
    for got, name in ((result.model, "model"), (divergence_.reference, "reference")):
        loss = -plain[name].gather(-1, targets).mean().item()
        assert got.perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)
        used = plain["ids"].flatten().tolist()
        size = len(AutoTokenizer.from_pretrained(MODEL).decode(used).encode())
        assert got.bits_per_byte.value == pytest.approx(loss / math.log(2) * len(used) / size, rel=1e-4)
    monkeypatch.setattr("quantkit_eval.evaluation.BATCH_BYTES", 3 * 4 * CONTEXT * 4096)  # three windows
    alone = evaluate(MODEL, text=text, context=CONTEXT, progress=False).texts[0]
    assert alone.divergence is None
    assert alone.model.perplexity.value == pytest.approx(divergence_.reference.perplexity.value, rel=1e-5)
    assert alone.tokens == plain["ids"][:, 1:].numel()
    assert alone.windows == len(plain["ids"])


def test_divergence_is_that_of_a_plain_loop(
    result: TextResult, divergence_: Divergence, plain: dict[str, torch.Tensor]
) -> None:
    log_q, log_p, targets = plain["model"], plain["reference"], plain["ids"][:, 1:]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert divergence_.kl_mean.value == pytest.approx(kl.mean().item(), rel=1e-4)
    p99 = np.quantile(kl.numpy(), 0.99, method="inverted_cdf")
    assert divergence_.kl_p99.value == pytest.approx(p99, rel=1e-3)
    guess, reference_guess = log_q.argmax(-1), log_p.argmax(-1)
    right, reference_right = guess == targets, reference_guess == targets
    assert divergence_.top1_agreement.value == pytest.approx((guess == reference_guess).double().mean().item())
    lost = (reference_right & ~right).double().mean().item()
    gained = (right & ~reference_right).double().mean().item()
    assert lost != gained
    assert divergence_.right_to_wrong.value == pytest.approx(lost)
    assert divergence_.wrong_to_right.value == pytest.approx(gained)
    assert divergence_.flips.value == pytest.approx(lost + gained)
    ratio = result.model.perplexity.value / divergence_.reference.perplexity.value
    assert divergence_.perplexity_ratio.value == pytest.approx(ratio)


def test_positions_are_those_of_a_plain_loop(result: TextResult, plain: dict[str, torch.Tensor]) -> None:
    """Eight parts of a window's 63 predictions, each token in one of them; the ratio is paired."""
    parts = [(one.first, one.last) for one in result.positions]
    assert parts == [(1, 8), (9, 16), (17, 24), (25, 32), (33, 40), (41, 48), (49, 56), (57, 63)]
    targets = plain["ids"][:, 1:, None]
    losses = {name: -plain[name].gather(-1, targets)[..., 0] for name in ("model", "reference")}
    for one in result.positions:
        own, original = (losses[name][:, one.first - 1 : one.last].mean().item() for name in ("model", "reference"))
        assert one.reference is not None
        assert one.ratio is not None
        assert one.perplexity.value == pytest.approx(math.exp(own), rel=1e-4)
        assert one.reference.value == pytest.approx(math.exp(original), rel=1e-4)
        assert one.ratio.value == pytest.approx(math.exp(own - original), rel=1e-4)
        assert one.ratio.low < one.ratio.value < one.ratio.high
        assert one.ratio.high / one.ratio.low < one.perplexity.high / one.perplexity.low  # paired: far narrower


def test_a_model_does_not_differ_from_itself(text: Path) -> None:
    result = evaluate(MODEL, ref=MODEL, text=text, context=CONTEXT, tokens=300, progress=False).texts[0]
    assert result.windows == 300 // CONTEXT
    assert result.divergence is not None
    assert result.divergence.kl_mean == Interval(0, 0, 0)
    assert result.divergence.top1_agreement.value == 1
    assert result.divergence.flips.value == 0


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
        assert got.value == pytest.approx(statistic(values_WP))
        assert (got.low, got.high) == pytest.approx((low, high))


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap.mean(generator.normal(size=100), bootstrap.draw(100, trial, 300))
        covered += interval.low <= 0 <= interval.high
    assert 0.88 < covered / 200 <= 0.99


def test_draws_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap.draw(7, seed=1, resamples=50)
    monkeypatch.setattr(bootstrap, "CELLS", 7 * 8)
    assert np.array_equal(whole, bootstrap.draw(7, seed=1, resamples=50))


def test_result_is_json_and_says_what_was_measured(
    evaluation: Evaluation, result: TextResult, divergence_: Divergence, noisy: Path, text: Path
) -> None:
    found = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    (only,) = found["texts"]
    assert only["text"]["sha256"] == read_text(text).sha256
    assert only["perplexity"]["value"] == result.model.perplexity.value
    assert only["kl"]["mean"]["high"] == divergence_.kl_mean.high
    assert only["reference"]["accuracy"]["low"] == divergence_.reference.accuracy.low
    assert (found["bos"], found["context"], found["ref"]) == (False, CONTEXT, str(MODEL))
    assert {"torch", "transformers", "python"} <= found["versions"].keys()
    for interval in (result.model.perplexity, divergence_.kl_mean, divergence_.flips):
        assert interval.low < interval.value < interval.high
    assert evaluate(noisy, ref=MODEL, text=text, context=CONTEXT, progress=False).texts == evaluation.texts


def test_several_texts_are_those_one_by_one(noisy: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text((MODEL / "eval.txt").read_text(encoding="utf-8")[:2500], encoding="utf-8")
    both = evaluate(noisy, ref=MODEL, text=[text, other], context=CONTEXT, progress=False)
    alone = [evaluate(noisy, ref=MODEL, text=one, context=CONTEXT, progress=False).texts[0] for one in (text, other)]
    assert list(both.texts) == alone
    console = Console(record=True, width=80, file=StringIO())
    render(both, console)
    shown = console.export_text()
    for one in both.texts:
        assert f"{one.model.perplexity.value:.3f}" in shown
        assert str(one.tokens) in shown
    assert "other.txt" in shown


def test_bos_begins_each_window_and_is_never_predicted(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = tmp_path / "text.txt"
    text.write_text((MODEL / "eval.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    auto = evaluate(folder, text=text, context=CONTEXT, progress=False)
    always = evaluate(folder, text=text, context=CONTEXT, bos="always", progress=False)
    assert (auto.bos, always.bos) == (False, True)
    token = AutoTokenizer.from_pretrained(folder).bos_token
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    begun = evaluate(folder, text=text, context=CONTEXT, progress=False)
    never = evaluate(folder, text=text, context=CONTEXT, bos="never", progress=False)
    assert begun.bos
    assert begun.texts == always.texts
    assert never.texts == auto.texts
    assert begun.texts != never.texts
    # by hand: windows of BOS and CONTEXT - 1 tokens, of which each is predicted
    plain = AutoTokenizer.from_pretrained(MODEL)(text.read_bytes().decode(), add_special_tokens=False)["input_ids"]
    step = CONTEXT - 1
    windows = torch.tensor(plain[: len(plain) // step * step]).view(-1, step)
    ids = torch.cat([torch.zeros(len(windows), 1, dtype=torch.int64), windows], 1)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        losses = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, windows[..., None])
    assert begun.texts[0].model.perplexity.value == pytest.approx(math.exp(-losses.mean().item()), rel=1e-4)
    assert begun.texts[0].tokens == windows.numel()


def test_rendering(evaluation: Evaluation, result: TextResult) -> None:
    console = Console(record=True, width=120, file=StringIO())
    render(evaluation, console)
    shown = console.export_text()
    for label in ("perplexity", "bits per byte", "KL(original || this)", "top-1 agreement", "right to wrong"):
        assert label in shown
    assert f"{result.model.perplexity.value:.3f}" in shown
    row = table_row(result, "noisy")
    assert row.count("|") == TABLE_HEADER.splitlines()[0].count("|")
    alone = replace(result, divergence=None)
    render(replace(evaluation, ref=None, texts=(alone,)), console)
    assert "KL" not in console.export_text()
    assert table_row(alone, "noisy").count("|") == row.count("|")


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


MISTAKES = {
    "no such text": ({"text": "absent.txt"}, "absent.txt: no such text file\nhint: give a UTF-8 text file, or one of"),
    "a name misspelt": ({"text": "wikitxt2"}, "no such text file\nhint: did you mean wikitext2?"),
    "a folder": ({"text": str(MODEL)}, "is a folder, not a text file"),
    "one text of two": ({"text": [str(MODEL / "eval.txt"), "absent.txt"]}, "absent.txt: no such text file"),
    "no text": ({"text": []}, "no text to evaluate on"),
    "no such model": ({"model": "./absent"}, "absent: no such folder"),
    "no such original": ({"ref": "./absent"}, "absent: no such folder"),
    "a long context": ({"context": 1025}, "context 1025 is longer than the 1024 positions"),
    "a short context": ({"context": 1}, "context must be at least 2 tokens, got 1"),
    "few tokens": ({"tokens": 100}, "tokens: 100, but two windows of 256 need 512"),
    "a device": ({"device": "gpu"}, "no device is called 'gpu'\nhint: did you mean `cuda`?"),
    "bos": ({"bos": "yes"}, "bos is 'yes'; expected auto, always or never"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_before_torch_is_imported(case: str) -> None:
    given, message = MISTAKES[case]
    arguments = {"model": str(MODEL), "ref": None, "text": str(MODEL / "eval.txt"), "context": 256} | given
    with pytest.raises(UserError) as failure:
        evaluate(arguments.pop("model"), **arguments)
    assert message in str(failure.value)
    options = [
        part for key, value in given.items() if key not in ("model", "text") for part in (f"--{key}", str(value))
    ]
    texts = given.get("text", str(MODEL / "eval.txt"))
    options += [part for name in ([texts] if isinstance(texts, str) else texts) for part in ("--text", name)]
    if case == "no text":
        return  # the command then takes the default
    code = (
        "import sys; sys.argv[0] = 'quantkit'\n"
        "from quantkit.cli.main import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    command = [sys.executable, "-c", code, "eval", str(given.get("model", MODEL)), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 5}, "model: found int, expected a path or a name"),
        ({"ref": object()}, "ref: found object, expected"),
        ({"text": 5}, "text: found int, expected"),
        ({"text": [None]}, "text: found NoneType, expected"),
        ({"context": "64"}, "context: found '64', expected a whole number"),
        ({"tokens": 1.5}, r"tokens: found 1\.5, expected a whole number"),
        ({"progress": "bar"}, "progress is 'bar'"),
    ],
)
def test_arguments_of_the_wrong_kind(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(**({"model": MODEL, "text": MODEL / "eval.txt"} | given))


def test_model_refusals(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match="an empty folder"):
        evaluate(tmp_path, text=text)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        evaluate(tmp_path, text=text)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, tmp_path)
    with pytest.raises(UserError, match="no weights"):
        evaluate(tmp_path, text=text, context=CONTEXT)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
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


def test_general_is_read_from_its_start_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the text for a first look, which must not take hours; a text that was chosen is read whole."""
    from quantkit_eval import evaluation

    monkeypatch.setattr(evaluation, "GENERAL_TOKENS", 512)
    first = evaluate(MODEL, context=128, device="cpu", progress=False).texts[0]
    assert (first.windows, first.tokens) == (4, 4 * 127)
    more = evaluate(MODEL, context=128, tokens=1024, device="cpu", progress=False).texts[0]
    assert more.windows == 8


def test_a_quantized_cache_is_what_the_model_reads(text: Path, plain: dict[str, torch.Tensor]) -> None:
    """Against transformers' model with rounding by hand; `none` is the model as it is."""
    windows = plain["ids"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    spec = CacheSpec(KVSpec(8, "int", "token"), KVSpec(4, "int", "token", symmetric=False, group_size=32))
    with torch.no_grad():
        logits = [CachedModel(model, "m", spec)(window[None]).logits[:, :-1] for window in windows]
    log_q = torch.cat(logits).double().log_softmax(-1)
    log_p = plain["reference"]
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    given = "keys=int8,values=int4-asym-g32"
    found = evaluate(MODEL, ref=MODEL, text=text, context=CONTEXT, kv_cache=given, progress=False)
    d = found.texts[0].divergence
    assert d is not None
    assert d.kl_mean.value == pytest.approx(wanted, rel=1e-3)
    assert wanted > 1e-4
    assert found.to_json()["kv_cache"] == given
    exact = evaluate(MODEL, ref=MODEL, text=text, context=CONTEXT, kv_cache="none", progress=False).texts[0].divergence
    assert exact is not None
    assert exact.kl_mean.value < 1e-9


def test_a_model_without_keys_and_values_has_no_quantized_cache() -> None:
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, intermediate_size=64)
    with pytest.raises(UserError, match=r"keeps no keys and values(?s:.*)hint: leave out --kv-cache"):
        CachedModel(MambaForCausalLM(config), "mamba", None)(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_cache": "int9"}, "did you mean `int8`"),
        ({"kv_cache": "keys=int8"}, "says nothing of the values"),
        ({"kv_cache": 8}, "kv_cache: found int, expected a name like int8"),
    ],
)
def test_caches_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(MODEL, progress=False, **given)
