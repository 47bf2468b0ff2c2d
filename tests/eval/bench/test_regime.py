"""What limits prefill and decode, told from steps with known numbers."""

from dataclasses import replace

import pytest
from quantkit_eval.bench.regime import StepRecord, phases, regime

STEP = StepRecord(
    seconds=0.1, model_seconds=0.095, prompt_tokens=0, tokens=4, sequences=4, slots=8, waiting=0, no_blocks=False,
    flops=1e9, bytes=1e8,
)  # fmt: skip


def test_shares() -> None:
    steps = [STEP, replace(STEP, seconds=0.3, model_seconds=0.2)]
    found = regime(steps, peak_flops=1e11, copy_bytes=1e9)
    assert (found.steps, found.tokens, found.seconds) == (2, 8, pytest.approx(0.4))
    assert found.compute == pytest.approx(2e9 / 0.4 / 1e11)
    assert found.bandwidth == pytest.approx(2e8 / 0.4 / 1e9)
    assert found.host == pytest.approx(1 - 0.295 / 0.4)
    assert found.operators == pytest.approx(0.295 / 0.4 - 0.5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"flops": 6e9, "bytes": 5e7}, "compute"),
        ({"bytes": 7e7}, "bandwidth"),
        ({"bytes": 1e9, "flops": 5e9}, "bandwidth"),
        ({"bytes": 0.0, "model_seconds": 0.02}, "host"),
        ({"bytes": 0.0}, "operators"),
        ({"waiting": 9, "no_blocks": True}, "capacity"),
        ({"waiting": 9}, "scheduler"),
        ({"waiting": 2, "bytes": 0.0}, "operators"),  # two of eight slots idle
    ],
)
def test_each_has_its_name(change: dict[str, float], name: str) -> None:
    found = regime([replace(STEP, **change)], peak_flops=1e11, copy_bytes=1e9)  # type: ignore[arg-type]
    assert found.name == name, found


def test_no_steps() -> None:
    assert regime([], 1e11, 1e9).name is None
    prompt = replace(STEP, prompt_tokens=3)
    assert phases([STEP, prompt]) == ([prompt], [STEP])
