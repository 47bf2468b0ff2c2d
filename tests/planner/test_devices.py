"""The table of devices: complete, in the names that verify takes, and found in any spelling."""

import pytest

from quantkit.errors import UserError
from quantkit.planner import devices
from quantkit.planner.devices import DEVICES, NAMES, check_device, measured_cpu
from quantkit.verification.engines.hardware import find_machine


@pytest.mark.parametrize("name", NAMES)
def test_verify_knows_every_device(name: str) -> None:
    assert find_machine(name)


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_every_row_is_complete_and_dense(device: devices.Device) -> None:
    assert device.source
    assert 16 <= device.memory / devices.GIB <= 512
    assert 0.2e12 < device.bandwidth < 20e12
    assert {"bf16", "int8"} <= device.peaks.keys() <= {"bf16", "fp8", "int8", "fp4"}
    # a sparse figure among dense ones would be twice as much
    assert device.peaks.get("fp8", 0) <= 2.1 * device.peaks["bf16"]
    assert device.peaks.get("fp4", 0) <= 2.1 * device.peaks["int8"]
    assert device.link.bandwidth < device.bandwidth
    assert device.link.latency == (8e-6 if device.link.name == "PCIe" else 2e-6)


def test_the_h100() -> None:
    h100 = DEVICES["h100"]
    assert (h100.memory, h100.bandwidth) == (80 << 30, 3.35e12)
    assert h100.peaks["bf16"] == pytest.approx(990e12, rel=1e-3)
    assert h100.peaks["fp8"] == 2 * h100.peaks["bf16"] == h100.peaks["int8"]
    assert "fp4" not in h100.peaks


@pytest.mark.parametrize(
    ("given", "name"),
    [("H100", "h100"), ("NVIDIA H100", "h100"), ("RTX 4090", "rtx4090"), ("4090", "rtx4090"), ("mi-300x", "mi300x")],
)
def test_any_spelling(given: str, name: str) -> None:
    assert check_device(given) == name


@pytest.mark.parametrize(("given", "near"), [("h10", "h100"), ("mi300", "mi300x"), ("rtx409", "rtx4090")])
def test_an_unknown_device_names_the_nearest(given: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown GPU '{given}'\nhint: did you mean `{near}`\\?"):
        check_device(given)


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(UserError, match=r"there are h100, .*cpu"):
        check_device("quantum")


def test_the_cpu_measures_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CPU_SECONDS", 0.01)
    found = measured_cpu()
    assert found.peaks.keys() == {"bf16", "int8"}
    assert found.memory > 1 << 30
    assert 1e8 < found.bandwidth < 1e13
    assert all(1e8 < peak < 1e15 for peak in found.peaks.values())
    assert "measured" in found.source
