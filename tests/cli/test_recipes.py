"""`quantkit recipes` as a table to choose from: its figures are the recipes' own, its hardware what verify says."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.cli.recipe_table import fast_gpus, runs_fast
from quantkit.cli.recipe_table import recipes as recipe_rows
from quantkit.recipe import load as recipes
from quantkit.verification import ENGINES, verify_folder


def invoke(*arguments: str, width: int = 80) -> Any:
    return CliRunner().invoke(app, ["recipes", *arguments], prog_name="quantkit", env={"COLUMNS": str(width)})


def names(*arguments: str) -> list[str]:
    return [row["name"] for row in json.loads(invoke(*arguments, "--json").stdout)]


def test_the_table_fits_and_names_every_recipe() -> None:
    shown = invoke()
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1 : 1 + len(recipes.recipe_names())]] == names()
    assert lines[0].split() == ["recipe", "bits", "algorithm", "calib", "activations", "fast", "GPUs", "KL"]
    row = next(line for line in lines if line.startswith("fp8-dynamic "))
    assert row.split() == ["fp8-dynamic", "8.10", "rtn", "no", "fp8", "Ada+", "0.0069"]
    row = next(line for line in lines if line.startswith("w8a8 "))
    assert row.split() == ["w8a8", "8.10", "smoothquant+gptq", "yes", "int8", "Turing-Hopper", "0.0006"]


def test_figures_are_those_of_the_headers() -> None:
    found = {row.name: row for row in recipe_rows()}
    assert set(found) == set(recipes.recipe_names())
    for name, row in found.items():
        header = recipes.recipe_text(name)
        assert f"KL {row.measured.kl:.5f}, top-1 agreement {row.measured.top1:.1f} %" in header
        assert f"{row.bits_per_weight:.3f} bits per weight on {row.measured.model}" in header
        assert row.measured.how in header
        assert (row.calibration == "none") == (recipes.load(name).calibration is None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gptq-w4a16", ("needed", "16-bit", "Turing+")),
        ("rtn-w4a16", ("used", "16-bit", "Turing+")),
        ("rtn-w8a16", ("none", "16-bit", "Turing+")),
        ("gptq-w3a16", ("needed", "16-bit", "-")),
        ("fp8", ("needed", "fp8 static", "Ada+")),
        ("mixed-fp8-w4a16", ("needed", "16-bit/fp8", "Ada+")),
        ("nvfp4", ("needed", "nvfp4", "Blackwell")),
        ("nvfp4a16", ("needed", "16-bit", "Turing+")),
    ],
)
def test_what_a_recipe_needs(name: str, expected: tuple[str, str, str]) -> None:
    row = next(row for row in recipe_rows() if row.name == name)
    assert (row.calibration, row.activations, fast_gpus(row, "vllm")) == expected


def test_filters() -> None:
    every = names()
    assert {"nvfp4", "mxfp8"} <= set(every) - set(names("--for", "h100"))
    assert "gptq-w4a16" in names("--for", "h100", "--engine", "vllm")
    assert "w8a8" in names("--for", "cpu")
    assert "fp8-block" not in names("--for", "cpu")
    assert {"w4a8", "gptq-w3a16", "mxfp4"}.isdisjoint(names("--engine", "sglang"))
    assert "nvfp4" in names("--for", "b200", "--engine", "tensorrt-llm")
    nothing = invoke("--for", "mi300", "--engine", "tensorrt-llm")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "no shipped recipe has a fast kernel on mi300 with tensorrt-llm" in nothing.stderr
    for engine in ENGINES:
        assert all(len(line) <= 80 for line in invoke("--engine", engine).stdout.splitlines())


SETTINGS = ["output.engine=null", "calibration=null"]
BUILT = {
    "rtn-w4a16": [],
    "rtn-w8a16": [],
    "fp8-dynamic": [],
    "fp8-block": ["weights.algorithm={rtn: {range: mse}}"],
    "mxfp8": ["weights.algorithm={rtn: {range: mse}}"],
    "nvfp4a16": ["weights.algorithm={rtn: {range: mse}}"],
}


@pytest.mark.parametrize("name", BUILT)
def test_hardware_is_what_verify_says_of_a_written_folder(name: str, tmp_path: Path) -> None:
    """The table judges a recipe without writing anything; here it is written and judged."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from quantkit.quantization import pipeline

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=1, tie_word_embeddings=False, **sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    recipe = recipes.load(name, [*SETTINGS, *BUILT[name]], str(tmp_path / "m"))
    pipeline.quantize(recipe, tmp_path / "q", progress=False)
    row = next(row for row in recipe_rows() if row.name == name)
    for engine in ENGINES:
        judged = verify_folder(tmp_path / "q", engine)
        assert (engine in row.engines) == (judged.verdict != "refused"), engine
        if engine in row.engines:
            runs = {machine: "yes" if how == "slow kernel" else how for machine, how in row.engines[engine].items()}
            assert judged.hardware == runs
            good = ("yes", "weight-only") if row.activations == "16-bit" else ("yes",)
            for machine, how in row.engines[engine].items():
                assert runs_fast(row, engine, machine) == (how in good)
