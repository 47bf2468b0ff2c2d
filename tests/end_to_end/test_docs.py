"""The README describes what is there."""

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.recipe import load as recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


PACKAGES = [
    path.parent for root in ("quantkit", "eval", "kernels") for path in sorted((ROOT / root).rglob("__init__.py"))
]


def test_the_tree_names_every_package() -> None:
    tree = README[README.index("## File tree") : README.index("## Limits")]
    assert len(tree.splitlines()) <= 28
    top = [path for path in PACKAGES if path.parent == ROOT / "quantkit"]
    for path in [*top, *(ROOT / name for name in ("kernels", "eval", "recipes", "examples", "tests"))]:
        assert f"{path.name}/" in tree, f"{path.name}/ is not in the README's tree"
    for name in re.findall(r"\b[\w/]+\.py\b", tree):
        found = [*ROOT.glob(f"quantkit/{name}"), *ROOT.glob(name)]
        assert found, f"the README's tree names {name}, which does not exist"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_named_in_its_package(package: Path) -> None:
    """The map of a package is its docstring: it names every file in it, and none that is not there."""
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    files = {path.name for path in package.iterdir() if path.suffix in (".py", ".cpp", ".h")}
    files -= {"__init__.py", "__main__.py"}
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    named = set(re.findall(r"(?<![\w/.])\w+\.(?:py|cpp|h)\b|(?<![\w/.])\w+/(?!\w)", doc))
    named.discard("llama.cpp")  # the engine
    assert files | folders <= named, f"not named: {sorted((files | folders) - named)}"
    assert named <= files | folders, f"named, but not there: {sorted(named - files - folders)}"


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
