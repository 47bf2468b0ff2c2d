"""The environment of `make test-oldest` has the lower bounds of pyproject.toml."""

import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.tools.oldest import lower_bounds

ROOT = Path(__file__).resolve().parents[2]

SAMPLE = """
[project]
name = "sample"
dependencies = ["torch>=2.13", "ruamel.yaml >= 0.18.0,<1", "huggingface-hub>=1.5rc1"]
[project.optional-dependencies]
kernels = ["triton>=3.7.1; sys_platform == 'linux'"]
dev = ["pyright[nodejs]>=1.1.400", "triton>=3.7.1; sys_platform == 'linux'", "torch>=2.13"]
"""


def test_a_sample() -> None:
    assert lower_bounds(SAMPLE) == {
        "torch": "2.13",
        "ruamel.yaml": "0.18.0",
        "huggingface-hub": "1.5rc1",
        "triton": "3.7.1",
        "pyright": "1.1.400",
    }


def test_a_project_without_extras() -> None:
    assert lower_bounds('[project]\ndependencies = ["numpy>=2.0"]') == {"numpy": "2.0"}


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", "numpy==2.0", "numpy>2", "numpy~=2.0", "numpy!=2.0,>=2"])
def test_a_requirement_without_a_lower_bound(requirement: str) -> None:
    with pytest.raises(ValueError, match=r"numpy.*: expected a lower bound"):
        lower_bounds(f'[project]\ndependencies = ["torch>=2.13", "{requirement}"]')


def test_two_lower_bounds_of_one_package() -> None:
    with pytest.raises(ValueError, match=r"'torch>=2\.14': another lower bound of torch is 2\.13"):
        lower_bounds(SAMPLE.replace('"torch>=2.13"]', '"torch>=2.14"]'))


def test_every_dependency_of_ours_has_one() -> None:
    """Read with another parser: each requirement's lower bound is the printed pin."""
    command = [sys.executable, ROOT / "tests" / "tools" / "oldest.py", ROOT / "pyproject.toml"]
    printed = subprocess.check_output(command, text=True).split()
    pins = {pin.name: str(pin.specifier) for pin in map(Requirement, printed)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(r) for r in chain(project["dependencies"], *project["optional-dependencies"].values())]
    assert {requirement.name for requirement in requirements} == pins.keys()
    for requirement in requirements:
        assert pins[requirement.name] in str(requirement.specifier).replace(">=", "==").split(",")
