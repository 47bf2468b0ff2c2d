"""The README speaks of what is there."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit import recipe
from quantkit.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_tree_names_every_module() -> None:
    tree = README[README.index("## File tree") : README.index("## Limits")]
    for path in (ROOT / "quantkit").iterdir():
        if path.name.startswith("_") or path.name in {"api.py", "errors.py", "types.py", "progress.py", "memory.py"}:
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in tree, f"{name} is not in the README's tree"
    for name in re.findall(r"\b[\w/]+\.py\b", tree):
        found = [*ROOT.glob(f"quantkit/{name}"), *ROOT.glob(name)]
        assert found, f"the README's tree names {name}, which does not exist"


def test_every_recipe_is_named_and_measured() -> None:
    for name in recipe.recipe_names():
        assert f"`{name}`" in README
        assert re.search(r"^# Measured: .*\d", recipe.recipe_text(name), re.MULTILINE), f"{name} has no figures"


def test_its_recipe_is_valid() -> None:
    text = README[README.index("```yaml") + 7 :]
    (ROOT / "out").mkdir(exist_ok=True)
    path = ROOT / "out" / "readme-recipe.yaml"
    path.write_text(text[: text.index("```")])
    assert recipe.load(path).weights.algorithm == "gptq"


@pytest.mark.parametrize("verb", ["quantize", "eval", "inspect", "recipes"])
def test_its_commands_exist(verb: str) -> None:
    assert f"quantkit {verb}" in README
    shown = CliRunner().invoke(app, [verb, "--help"]).output
    for line in README.splitlines():
        if line.strip().startswith(f"quantkit {verb}"):
            for option in re.findall(r"--[\w-]+", line):
                assert option in shown, f"{verb} has no {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([\w-]+)", README)) - {"demo TORCH"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_no_package_shadows_another() -> None:
    for folder in ("kernels", "eval", "recipes", "tests", "examples"):
        assert not (ROOT / folder / "__init__.py").exists()
