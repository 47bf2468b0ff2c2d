"""Names of devices: those that are, and what was meant by those that are not."""

import pytest

from quantkit.device_names import check_device_name
from quantkit.errors import UserError


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps", "xpu", "xpu:1"])
def test_devices(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("quantkit.device_names._installed", lambda: "2.13.0+cu130")
    check_device_name(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *[("gpu", "did you mean `cuda`?"), ("GPU", "did you mean `cuda`?"), ("nvidia", "did you mean `cuda`?")],
        *[("gpu:1", "did you mean `cuda:1`?"), ("cuda0", "did you mean `cuda:0`?"), ("0", "did you mean `cuda:0`?")],
        *[("CUDA", "did you mean `cuda`?"), ("cdua", "did you mean `cuda`?"), ("cuda:x", "did you mean `cuda`?")],
        *[("metal", "did you mean `mps`?"), ("abacus", "cuda:1 is the second GPU"), ("", "cuda:1 is the second GPU")],
    ],
)
def test_what_was_meant(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        check_device_name(name)
    first, second = str(caught.value).splitlines()
    assert repr(name) in first
    assert second.startswith("hint: ")
    assert hint in second
