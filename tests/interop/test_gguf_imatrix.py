"""llama-quantize takes our importance matrices, we read llama-imatrix's, and both find the same numbers.

Needs the tools of llama.cpp: QUANTKIT_LLAMACPP names their folder.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

import quantkit
from quantkit.checkpoint.gguf_file import read_gguf
from quantkit.formats.gguf.imatrix import importance_of, read_imatrix, write_imatrix
from tests.interop.gguf_support import tool

pytestmark = pytest.mark.interop

TINY_LLAMA = Path(__file__).parents[2] / "examples/tiny-llama"
WINDOWS, LENGTH = 4, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in F32, a text, and llama-imatrix's matrix of it in both forms."""
    program, folder = tool("llama-imatrix"), tmp_path_factory.mktemp("imatrix")
    quantkit.convert(TINY_LLAMA, folder / "f32.gguf", requantize="f32")
    text = (TINY_LLAMA / "eval.txt").read_text()[:4000]
    (folder / "text.txt").write_text(text)
    for name, form in (("theirs.gguf", "gguf"), ("theirs.dat", "dat")):
        args = ["-m", "f32.gguf", "-f", "text.txt", "-o", name, "--output-format", form, "--no-ppl", "-t", "1"]
        subprocess.run(
            [program, *args, "-c", str(LENGTH), "-b", str(LENGTH), "--chunks", str(WINDOWS)],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return folder


def quantized(folder: Path, matrix: str, name: str, mix: str = "Q4_K_M") -> dict[str, bytes]:
    """Every tensor's bytes of what llama-quantize makes of the F32 file with a matrix."""
    args = ["--imatrix", matrix, "f32.gguf", name, mix, "1"]
    done = subprocess.run([tool("llama-quantize"), *args], cwd=folder, check=True, capture_output=True, text=True)
    assert "did not find weights for blk" not in done.stdout + done.stderr
    data = (folder / name).read_bytes()
    return {n: data[t.start : t.start + t.nbytes] for n, t in read_gguf(folder / name).tensors.items()}


def test_theirs_in_both_forms_is_one_matrix(folder: Path) -> None:
    new, old = read_imatrix(folder / "theirs.gguf"), read_imatrix(folder / "theirs.dat")
    assert new.entries.keys() == old.entries.keys()
    assert (new.chunks, new.chunk_size, new.datasets) == (WINDOWS, LENGTH, ("text.txt",))
    assert (old.chunks, old.datasets) == (WINDOWS, ("text.txt",))
    for name in new.entries:
        one, other = importance_of(new, name), importance_of(old, name)
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_ours_and_theirs_find_the_same(folder: Path) -> None:
    calibration = {"data": str(folder / "text.txt"), "samples": WINDOWS, "seq_len": LENGTH, "seed": None, "bos": False}
    quantkit.imatrix(TINY_LLAMA, folder / "ours.gguf", calibration=calibration, progress="off")
    ours, theirs = read_imatrix(folder / "ours.gguf"), read_imatrix(folder / "theirs.gguf")
    assert set(theirs.entries) <= set(ours.entries)
    assert set(ours.entries) - set(theirs.entries) == {"token_embd.weight"}  # the tied head, which it leaves out
    for name, entry in theirs.entries.items():
        mine = ours.entries[name]
        assert mine.counts.tolist() == entry.counts.tolist() == [WINDOWS * LENGTH]
        gap = np.abs(mine.sums - entry.sums).sum() / entry.sums.sum()
        assert gap < 2e-3, (name, gap)  # its cache of keys and values is float16
        assert np.abs(np.log(mine.sums / entry.sums)).max() < 0.02, name
    assert quantized(folder, "ours.gguf", "ours-q4_k_m.gguf")["token_embd.weight"]


def test_llama_quantize_takes_ours_as_its_own(folder: Path) -> None:
    write_imatrix(folder / "copy.gguf", read_imatrix(folder / "theirs.gguf"))
    expected = quantized(folder, "theirs.gguf", "one.gguf")
    assert quantized(folder, "copy.gguf", "two.gguf") == expected
    write_imatrix(folder / "copy.dat", read_imatrix(folder / "theirs.dat"))
    assert quantized(folder, "copy.dat", "three.gguf") == quantized(folder, "theirs.dat", "four.gguf")
    plain = [tool("llama-quantize"), "f32.gguf", "plain.gguf", "Q4_K_M", "1"]
    subprocess.run(plain, cwd=folder, check=True, capture_output=True)
    file = read_gguf(folder / "plain.gguf")
    tensor = file.tensors["blk.0.attn_q.weight"]
    without = (folder / "plain.gguf").read_bytes()[tensor.start : tensor.start + tensor.nbytes]
    assert without != expected["blk.0.attn_q.weight"]  # so the matrix did count


def test_our_rounding_with_theirs_is_not_worse_than_theirs(folder: Path) -> None:
    """Squared errors times E[x^2] of the very file, over all linears; same types, no calibration text."""
    recipe = {"gguf": {"mix": "q4_k_m", "imatrix": str(folder / "theirs.gguf")}, "calibration": None}
    quantkit.quantize(TINY_LLAMA, recipe, folder / "ours", device="cpu", progress=False)
    quantized(folder, "theirs.gguf", "theirs-q4_k_m.gguf")
    quantkit.convert(TINY_LLAMA, folder / "alike.gguf", requantize="q4_k_m")
    paths = {"f32": "f32.gguf", "ours": "ours/model.gguf", "alike": "alike.gguf", "theirs": "theirs-q4_k_m.gguf"}
    files = {name: {t.name: t for t in GGUFReader(folder / path).tensors} for name, path in paths.items()}
    lost = dict.fromkeys(("ours", "theirs", "alike"), 0.0)
    for tensor, entry in read_imatrix(folder / "theirs.gguf").entries.items():
        assert files["ours"][tensor].tensor_type == files["theirs"][tensor].tensor_type
        original = files["f32"][tensor].data
        for name in lost:
            found = files[name][tensor]
            error = dequantize(found.data, found.tensor_type) - original
            lost[name] += float((error.astype(np.float64) ** 2 * entry.importance()[0]).sum())
    print({name: round(value / lost["theirs"], 3) for name, value in lost.items()})
    assert lost["ours"] < lost["theirs"]
    assert lost["ours"] < 0.95 * lost["alike"]  # columns count alike
