"""Worked examples: each figure here was made by hand."""

import pytest

from quantkit.planner.devices import DEVICES, GIB, Device, Link
from quantkit.planner.roofline import (
    HOST_STEP,
    REGIMES,
    Step,
    Work,
    all_reduce_bytes,
    all_reduces,
    cost_per_million,
    intensity,
    ridge,
    ring_seconds,
    step,
)

H100 = DEVICES["h100"]


def test_ridge_of_an_h100() -> None:
    assert int(ridge(990e12, 3.35e12)) == 295
    assert round(ridge(H100.peaks["bf16"], H100.bandwidth)) == 295


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (512, 512)])
def test_intensity_of_weights_is_the_number_of_tokens(tokens: int, expected: float) -> None:
    assert intensity(4096, 4096, tokens) == expected


def test_intensity_with_inputs_and_outputs() -> None:
    assert intensity(8192, 8192, 256) == 256
    assert intensity(8192, 8192, 256, io_bits=16) == pytest.approx(240.94, abs=0.01)
    assert round(intensity(8192, 8192, 256, io_bits=16)) == 241


def test_four_bit_weights_have_four_times_the_intensity() -> None:
    assert intensity(4096, 4096, 1, weight_bits=4) == 4


def test_fp8_prefill_is_about_1_8_times_as_fast() -> None:
    flops = 2 * 7e9 * 1024
    bf16, fp8 = (step(Work({kind: flops}, 16e9), H100) for kind in ("bf16", "fp8"))
    assert bf16.regime == fp8.regime == "compute"
    assert bf16.seconds / fp8.seconds == pytest.approx(1.8)


@pytest.mark.parametrize(("stored", "gain"), [(7e9, 2), (14e9, 1)], ids=["stored in fp8", "stored in bf16"])
def test_fp8_decode_is_faster_only_from_fewer_bytes(stored: float, gain: float) -> None:
    bf16, fp8 = step(Work({"bf16": 14e9}, 14e9), H100), step(Work({"fp8": 14e9}, stored), H100)
    assert bf16.regime == fp8.regime == "memory bandwidth"
    assert bf16.seconds / fp8.seconds == pytest.approx(gain)


def test_a_token_of_a_70b_model() -> None:
    size = 70e9 * 2
    assert size == 140e9
    found = step(Work({"bf16": 2 * 70e9}, size), H100)
    assert found.seconds * 1e3 == pytest.approx(42, abs=0.3)
    assert found.regime == "memory bandwidth"


@pytest.mark.parametrize(("latency", "total"), [(2e-6, 320e-6), (8e-6, 1280e-6)])
def test_all_reduces_of_a_70b_model(latency: float, total: float) -> None:
    assert all_reduces(80) == 160
    assert all_reduce_bytes(8192, 80) == 2.5 * 2**20
    device = Device("x", 80 * GIB, 3.35e12, {"bf16": 1e15}, Link("x", float("inf"), latency), "")
    found = step(Work({"bf16": 0.0}, 0.0, 160, all_reduce_bytes(8192, 80)), device, 2)
    assert found.interconnect_latency == pytest.approx(total)
    if latency == 2e-6:
        assert found.interconnect_latency / 10e-3 == pytest.approx(0.032)


def test_bytes_of_a_ring() -> None:
    assert ring_seconds(450e9, 1, 450e9) == 0
    assert ring_seconds(450e9, 2, 450e9) == 1
    assert ring_seconds(450e9, 8, 450e9) == 1.75


def test_one_device_has_no_links() -> None:
    assert step(Work({"bf16": 1.0}, 1.0, 160, 1e9), H100, 1).interconnect == 0


@pytest.mark.parametrize(
    ("parts", "regime"),
    [
        ((9, 1, 1, 1), "compute"),
        ((1, 9, 1, 1), "memory bandwidth"),
        ((1, 1, 9, 1), "interconnect bandwidth"),
        ((1, 1, 1, 9), "interconnect latency"),
    ],
)
def test_the_regime_is_what_takes_most(parts: tuple[float, ...], regime: str) -> None:
    found = Step(*(part * 1e-2 for part in parts))
    assert found.regime == regime
    assert regime in REGIMES


def test_a_small_step_waits_for_the_host() -> None:
    found = Step(1e-5, 2e-5)
    assert found.regime == "host overhead"
    assert found.seconds == HOST_STEP


def test_a_format_without_a_unit_is_multiplied_in_bf16() -> None:
    a100 = DEVICES["a100"]
    assert step(Work({"fp8": 312e12}, 0), a100).compute == step(Work({"bf16": 312e12}, 0), a100).compute == 1
    assert step(Work({"int8": 624e12}, 0), a100).compute == pytest.approx(1 / 0.9)


def test_cost_of_a_million_tokens() -> None:
    assert cost_per_million(2.5, 1, 1000) == pytest.approx(0.6944, abs=1e-4)
    assert cost_per_million(2.5, 4, 1000) == pytest.approx(4 * 0.6944, abs=1e-3)
