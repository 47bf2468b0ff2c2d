"""What quantkit makes of GGUF files beside llama.cpp itself and transformers' own loader.

llama.cpp runs through llama-cpp-python (QUANTKIT_LLAMACPP may name a folder with its libraries); otherwise skipped.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from quantkit_eval import evaluate
from quantkit_eval.llama_cpp_library import LlamaCppModel
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.verification import verify_folder
from tests.interop.gguf_support import binding
from tests.tiny_gguf import ARCHITECTURES, MODEL, bundled, tiny
from tests.verification.test_gguf import FAULTS

pytestmark = pytest.mark.interop
IDS = torch.arange(5, 37)[None].repeat(2, 1)
IDS[1] = IDS[1].flip(0)


@torch.no_grad()
def distance(path: Path) -> float:
    """How far llama.cpp's logits lie from those of the decoded model, relative to their size."""
    decoded = quantkit.load(path)(IDS).logits
    engine = LlamaCppModel(path, 32)(input_ids=IDS).logits
    assert engine.shape == decoded.shape
    return float((engine - decoded).norm() / decoded.norm())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "qwen3moe"])
def test_float32_logits(tmp_path: Path, name: str) -> None:
    """The engine's cache is float16: a thousandth. Experts are left out: a tie of two of them decides there."""
    binding()
    assert distance(tiny(name, "F32", 0).save(tmp_path / "m.gguf")) < 3e-3


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inputs_rounded_to_8_bits(tmp_path: Path, name: str, type_: str) -> None:
    """One to four per cent, as every evaluation of a decoded file says; more where two experts nearly tie."""
    binding()
    assert distance(tiny(name, type_).save(tmp_path / "m.gguf")) < (0.2 if name == "qwen3moe" else 0.06)


def test_the_scale_beside_a_weight(tmp_path: Path) -> None:
    binding()
    model = tiny("llama", "F32", 0)
    for i, part in enumerate(("attn_q", "attn_v", "ffn_down", "ffn_up")):
        model.tensors[f"blk.1.{part}.scale"] = np.array([0.5 + i], np.float32)
    path = model.save(tmp_path / "m.gguf")
    assert verify_folder(path, "llama.cpp").verdict == "loads"
    assert distance(path) < 3e-3


def test_eval_by_both(tmp_path: Path) -> None:
    binding()
    path = bundled(default="Q4_0").save(tmp_path / "m.gguf")
    options = {"ref": MODEL, "text": MODEL / "eval.txt", "context": 64, "tokens": 1024, "progress": False}
    decoded = evaluate(path, **options).texts[0]
    engine = evaluate(path, engine="llama.cpp", **options)
    found = engine.texts[0]
    assert engine.engine == "llama.cpp"
    assert decoded.divergence is not None
    assert found.divergence is not None
    assert found.divergence.kl_mean.value == pytest.approx(decoded.divergence.kl_mean.value, rel=0.15)
    assert found.model.perplexity.value == pytest.approx(decoded.model.perplexity.value, rel=0.02)
    assert found.divergence.reference == decoded.divergence.reference


RUN = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=32, n_threads=1, verbose=False).eval([3, 4, 5])"


@pytest.mark.parametrize("fault", FAULTS)
def test_llama_cpp_refuses_what_verify_refuses(tmp_path: Path, fault: str) -> None:
    """In a process of its own: some faults end it. What gets a warning alone runs."""
    binding()
    change, name, *_ = FAULTS[fault]
    model = tiny(name, "BF16")
    change(model)
    path = model.save(tmp_path / "m.gguf")
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True)
    assert (done.returncode != 0) == (verify_folder(path, "llama.cpp").verdict == "refused"), done.stderr[-500:]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3", "qwen3", "qwen3moe"])
def test_transformers_loads_what_verify_says(tmp_path: Path, name: str) -> None:
    """The same logits where verify has no more than a remark; an error or others where it refuses or warns."""
    if name == "qwen3moe" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("verify has the rules of transformers 5.24, which misreads a key that older ones read")
    path = tiny(name, "Q8_0").save(tmp_path / "m.gguf")
    sound = all(finding.level == "info" for finding in verify_folder(path, "transformers").findings)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        with torch.no_grad():
            found = theirs(IDS).logits
            same = np.allclose(found.numpy(), quantkit.load(path)(IDS).logits.numpy(), atol=2e-4)
    except Exception:
        same = False
    assert same == sound


def test_transformers_reads_the_bundled_file(tmp_path: Path) -> None:
    path = bundled(default="Q8_0").save(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, quantkit.load(path)(IDS).logits, atol=1e-4)
    shutil.rmtree(tmp_path)
