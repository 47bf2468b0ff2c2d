"""Evaluation by the paged engine: plain evaluation's figures, and those of a simulated quantized cache.

A window attends to the bit as transformers does, whatever its chunks, and products of many rows mostly sum in one order
too: on the machines it was tried on the figures are the same number. BOUND leaves room for others.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_eval import evaluate
from quantkit_eval.paged_model import PagedModel
from quantkit_eval.results import Evaluation
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
CONTEXT, TOKENS = 64, 640
BOUND = 1e-4  # relative, of perplexity and KL


def figures(result: Evaluation) -> list[float]:
    """Perplexity and mean KL."""
    (text,) = result.texts
    assert text.divergence is not None
    return [text.model.perplexity.value, text.divergence.kl_mean.value]


def same(one: Evaluation, other: Evaluation) -> bool:
    return figures(one) == pytest.approx(figures(other), rel=BOUND)


def run(model: Path, engine: str | None, kv_cache: str | None = None) -> Evaluation:
    options: Any = {"engine": engine, "kv_cache": kv_cache, "context": CONTEXT, "tokens": TOKENS, "progress": False}
    return evaluate(model, ref=MODEL, text=MODEL / "eval.txt", **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with packed weights, and a cache of int8 keys and int4 values."""
    out = tmp_path_factory.mktemp("packed") / "out"
    recipe = {"scheme": "W4A16", "kv_cache": {"keys": "int8", "values": "int4"}}
    quantkit.quantize(str(MODEL), recipe, out, progress=False)
    return out


def test_without_a_quantized_cache_it_is_plain_evaluation(packed: Path) -> None:
    paged, plain = run(packed, "paged", "none"), run(packed, None, "none")
    assert same(paged, plain)
    assert (paged.engine, paged.dtype) == ("paged", "float32")
    assert any("steps of 512 tokens on blocks of 64" in note for note in paged.notes)


@pytest.mark.parametrize("kv_cache", ["int8", "keys=int8,values=int4", "keys=int4,values=int8", "int4-asym", "fp8"])
def test_a_quantized_cache_is_its_simulation(kv_cache: str) -> None:
    assert same(run(MODEL, "paged", kv_cache), run(MODEL, None, kv_cache))


def test_the_folder_says_which_cache(packed: Path) -> None:
    paged = run(packed, "paged")
    assert same(paged, run(packed, None))
    assert figures(paged)[1] > 1.05 * figures(run(packed, "paged", "none"))[1]


@pytest.mark.parametrize(("chunk", "block_size"), [(1, 16), (7, 4), (64, 256)])
def test_chunks_and_pages_change_no_logit(chunk: int, block_size: int) -> None:
    """By more than float noise: 2e-5 of logits of about 10, and what the few codes that it moves are worth (0.003)."""
    ids = torch.randint(3, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    for spec, unmoved, most in (("none", 1, 1e-4), ("keys=int8,values=int4", 0.75, 0.05)):
        every = [
            PagedModel(MODEL, 40, torch.device("cpu"), spec, **how)
            for how in ({"chunk": chunk, "block_size": block_size}, {})
        ]
        off = (every[0](ids).logits - every[1](ids).logits).abs().amax(-1)
        assert (off < 1e-4).double().mean() >= unmoved
        assert off.max() < most


def test_the_command() -> None:
    arguments = ["--engine", "paged", "--kv", "keys=int8,values=int4", "--context", str(CONTEXT), "--tokens", "128"]
    command = ["eval", str(MODEL), "--ref", str(MODEL), "--text", str(MODEL / "eval.txt"), *arguments]
    found = CliRunner().invoke(app, [*command, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["engine"] == "paged"
    table = CliRunner().invoke(app, command)
    assert "paged on cpu, cache keys=int8,values=int4" in table.stdout
