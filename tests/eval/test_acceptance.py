"""The acceptance rate of a draft: against a plain loop over transformers' tokens, and by how well it is quantized."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_eval import evaluate, render
from quantkit_eval.acceptance import DRAFT_TOKENS, acceptance
from quantkit_eval.perplexity import Windows
from quantkit_eval.results import TextResult
from rich.console import Console
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.errors import UserError
from tests.runtime.engine.equality import generated

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
TEXT = MODEL / "eval.txt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, rounded to 3 bits and by GPTQ to 4."""
    home = tmp_path_factory.mktemp("drafts")
    weights: dict[str, Any] = {"group_size": 64}
    for name, bits, algorithm in (("rtn3", 3, "rtn"), ("gptq4", 4, "gptq")):
        recipe: dict[str, Any] = {"weights": weights | {"bits": bits, "algorithm": algorithm}}
        if algorithm == "gptq":
            text = str(MODEL / "calibration.txt")
            recipe |= {"calibration": {"data": text, "samples": 8, "seq_len": 128}}
        quantkit.quantize(str(MODEL), recipe, home / name, progress=False)
    return {"same": MODEL, "rtn3": home / "rtn3", "gptq4": home / "gptq4"}


def run(folder: Path, **options: Any) -> TextResult:
    more = {"text": TEXT, "context": 64, "tokens": 1024, "acceptance": True, "progress": False} | options
    return evaluate(folder, ref=MODEL, **more).texts[0]


def by_hand(original: Any, draft: Any, prompts: list[list[int]], new: int) -> tuple[int, int]:
    """Guesses made, and right, where the draft guesses behind what the original has said so far."""
    drafted = accepted = 0
    for prompt in prompts:
        said = prompt + generated(original, prompt, new)
        at = len(prompt) + 1  # the prompt's own step gives one token, without a guess
        while at < len(said):
            count = min(DRAFT_TOKENS, len(said) - at - 1)  # the step itself gives one more token
            if count:
                guesses = generated(draft, said[:at], count)
                right = next((i for i, guess in enumerate(guesses) if guess != said[at + i]), count)
                drafted, accepted, at = drafted + count, accepted + right, at + right
            at += 1
    return drafted, accepted


def test_the_better_copy_is_the_better_draft(folders: dict[str, Path]) -> None:
    """Also where the paged engine computes everything; and a draft of itself is always right."""
    rates = {}
    for name, folder in folders.items():
        found = run(folder)
        assert found.acceptance is not None
        rate = found.acceptance.rate
        assert rate.low <= rate.value <= rate.high
        assert (found.acceptance.draft_tokens, found.acceptance.prompts) == (4, 16)
        assert (found.acceptance.prompt_tokens, found.acceptance.new_tokens) == (32, 32)
        rates[name] = rate.value
    assert rates["rtn3"] + 0.05 < rates["gptq4"] < rates["same"] == 1
    paged = run(folders["rtn3"], engine="paged").acceptance
    assert paged is not None
    assert paged.rate.value == rates["rtn3"]


def test_it_is_what_a_plain_loop_counts(folders: dict[str, Path]) -> None:
    original, draft = (quantkit.load(folders[name], dtype="float32") for name in ("same", "rtn3"))
    ids = torch.randint(3, 4096, (3, 24), generator=torch.Generator().manual_seed(0))
    found = acceptance(original, draft, Windows(ids, 1.0))
    drafted, accepted = by_hand(original, draft, ids[:, :12].tolist(), 12)
    assert 0 < accepted < drafted
    assert found.rate.value == pytest.approx(accepted / drafted)
    assert (found.prompts, found.new_tokens) == (3, 12)


def test_other_figures_stay_as_they_are(folders: dict[str, Path]) -> None:
    """The models are in the engine's hands for a while, and then compute as before."""
    plain = run(folders["rtn3"], acceptance=False)
    with_it = run(folders["rtn3"])
    assert plain.acceptance is None
    assert (plain.model, plain.divergence) == (with_it.model, with_it.divergence)


def test_tables_and_json(folders: dict[str, Path]) -> None:
    options = ["--context", "32", "--tokens", "256", "--acceptance"]
    command = ["eval", str(folders["rtn3"]), "--ref", str(MODEL), "--text", str(TEXT), *options]
    table = CliRunner().invoke(app, command)
    assert table.exit_code == 0, table.output
    assert "guesses accepted as a draft" in table.stdout
    assert "4 at a time" in table.stdout
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["texts"][0]["acceptance"]
    assert 0 < found["rate"]["value"] < 1
    assert {name: found[name] for name in ("draft_tokens", "prompts", "new_tokens")} == {
        "draft_tokens": 4, "prompts": 8, "new_tokens": 16,
    }  # fmt: skip
    several = evaluate(MODEL, ref=MODEL, text=[TEXT, TEXT], context=32, tokens=64, acceptance=True, progress=False)
    out = Console(file=StringIO(), width=200)
    render(several, out)
    assert out.file.getvalue().count("100.00 %") == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref": None}, "an original"),
        ({"ref": MODEL, "context": 4}, "at least 8 tokens"),
        ({"ref": MODEL, "engine": "llama.cpp"}, "paged engine"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(MODEL, text=TEXT, acceptance=True, progress=False, **options)
