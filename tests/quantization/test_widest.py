"""The widest calibrated linear, on which the automatic amount of calibration text depends."""

import pytest

from quantkit.quantization.calibration.widest import widest_input
from quantkit.recipe.recipe import Recipe
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("name", "ignore", "features"),
    [
        ("llama", [], 80),
        ("llama", ["re:.*down_proj"], 48),
        ("llama", ["Linear"], 0),
        ("gpt2", [], 192),  # weights [K, N]
        ("mixtral", [], 80),  # experts
        ("opt", [], 80),
    ],
    ids=str,
)
def test_widest_input(name: str, ignore: list[str], features: int) -> None:
    assert widest_input(tiny_model(name), Recipe(ignore=ignore)) == features
