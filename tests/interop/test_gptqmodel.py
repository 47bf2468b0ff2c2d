"""gptqmodel, the reader of GPTQ and AWQ folders behind transformers, decodes our tensors to the very floats we do.

Folders converted from compressed-tensors run there too, negative scales and all.

Needs the interpreter of an environment with gptqmodel 7.7 (it asks for torch 2.14 but runs with 2.13):

    python -m venv gm && gm/bin/pip install torch==2.13.0
    gm/bin/pip install --no-deps gptqmodel==7.7.0 optimum
    gm/bin/pip install transformers==5.23.0 accelerate datasets threadpoolctl device-smi pypcre tokenicer logbar \
        defuser dill pillow ninja requests protobuf
    QUANTKIT_GPTQMODEL_PYTHON=gm/bin/python pytest tests/interop/test_gptqmodel.py
"""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.conversion import convert
from quantkit.formats import FORMATS
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.types import QuantizedWeight, TensorSpec
from tests.interop.packing import pack_folder
from tests.interop.tiny_llama import save_tiny_llama

PYTHON = os.environ.get("QUANTKIT_GPTQMODEL_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(PYTHON is None, reason="QUANTKIT_GPTQMODEL_PYTHON does not name an interpreter with gptqmodel"),
]
Choose = Callable[[str], TensorSpec | None]
SHAPE = (64, 128)
SPECS = [TensorSpec(bits, size, sym) for bits, size, sym in product((2, 3, 4, 8), (32, -1), (True, False))]
CASES = {
    f"{name} {spec}{' negative scales' * signed}": (name, spec, signed)
    for name, spec, signed in product(("gptq", "gptq_v2", "awq"), SPECS, (False, True))
    if name != "awq" or spec.bits == 4
}


def weight(spec: TensorSpec, signed: bool) -> QuantizedWeight:
    (N, K), draw = SHAPE, torch.Generator().manual_seed(spec.bits)
    G = spec.groups(K)
    codes_NK = torch.randint(0, spec.levels, (N, K), dtype=torch.uint8, generator=draw)
    scale_NG = (torch.rand(N, G, generator=draw) * 0.1 + 0.01).half()
    zero_NG = None if spec.symmetric else torch.randint(1, spec.levels, (N, G), dtype=torch.uint8, generator=draw)
    q = QuantizedWeight(codes_NK, scale_NG, zero_NG, spec)
    return (
        replace(q, scale_NG=torch.where(torch.rand(N, G, generator=draw) < 0.5, -scale_NG, scale_NG)) if signed else q
    )


def python(script: str, *arguments: Path) -> None:
    assert PYTHON is not None
    result = subprocess.run(
        [PYTHON, str(Path(__file__).with_name(script)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gptqmodel")
    cases = {
        case: {
            "format": name,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.symmetric,
            "shape": SHAPE,
            "tensors": FORMATS[name].pack(weight(spec, signed)),
        }
        for case, (name, spec, signed) in CASES.items()
    }
    torch.save(cases, folder / "cases.pt")
    python("gptqmodel_weights.py", folder / "cases.pt", folder / "out.pt")
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("case", CASES)
def test_same_floats(theirs: dict[str, dict[str, Tensor]], case: str) -> None:
    _, spec, signed = CASES[case]
    ours_NK = dequantize(weight(spec, signed))
    assert theirs[case]["weight"].dtype == ours_NK.dtype == torch.float16
    assert torch.equal(theirs[case]["weight"], ours_NK)
    assert torch.equal(theirs[case]["product"], ours_NK.T)


def every_second(name: str) -> TensorSpec | None:
    """Some linears dense, the same ones in each block."""
    return None if name.endswith(("k_proj", "down_proj")) else TensorSpec(4, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "negative"),
    [(TensorSpec(4, 128), True), (TensorSpec(4, 32, False), True), (every_second, False)],
    ids=["sym", "asym", "some dense"],
)
def test_converted_folders_in_transformers(tmp_path: Path, spec: TensorSpec | Choose, negative: bool) -> None:
    """Through gptqmodel's CPU kernels: every tensor finds its place, and the logits are the dense equal's."""
    save_tiny_llama(tmp_path / "source")
    pack_folder(tmp_path / "source", tmp_path / "packed", tmp_path / "dense", spec, negative=negative)
    names = ("gptq", "gptq_v2", "awq")
    for name in names:
        convert(tmp_path / "packed", tmp_path / name, name)
    python("gptqmodel_logits.py", tmp_path / "out.pt", *(tmp_path / name for name in ("dense", "source", *names)))
    logits = torch.load(tmp_path / "out.pt")
    dense, _ = logits[str(tmp_path / "dense")]
    for name in names:
        found, lost = logits[str(tmp_path / name)]
        assert lost == 0
        assert (found - dense).norm() < 0.01 * dense.norm()
    assert (logits[str(tmp_path / "source")][0] - dense).norm() > 0.05 * dense.norm()  # the measure can tell
