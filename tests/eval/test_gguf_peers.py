"""The comparison with llama.cpp's quantizer: what its tools print, and what is found to differ between two files."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PEERS = str(Path(__file__).resolve().parents[2] / "eval" / "peers")

# Recorded from llama-perplexity of October 2026, two of its 178 chunk lines left.
RECORDED = """0.00.029.592 I
0.00.031.471 I kl_divergence: computing over 178 chunks, n_ctx=256, batch_size=2048, n_seq=8

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1       9.3029 ±    1.9104       0.01153 ±    0.01613       0.01508 ±    0.00130     3.216 ±  0.290 %    93.701 ±  2.161 %
 178       9.9875 ±    0.1766       0.02173 ±    0.00139       0.01767 ±    0.00014     3.588 ±  0.041 %    92.750 ±  0.172 %

====== Perplexity statistics ======
Mean PPL(Q)                   :   9.987483 ±   0.176635
Mean PPL(base)                :   9.772810 ±   0.172034
Cor(ln(PPL(Q)), ln(PPL(base))):  99.69%
Mean ln(PPL(Q)/PPL(base))     :   0.021729 ±   0.001389
Mean PPL(Q)/PPL(base)         :   1.021966 ±   0.001419
Mean PPL(Q)-PPL(base)         :   0.214673 ±   0.014448

====== KL divergence statistics ======
Mean    KLD:   0.017670 ±   0.000143
Maximum KLD:   0.399695
99.9%   KLD:   0.205924
Median  KLD:   0.012143
Minimum KLD:  -0.000001

====== Token probability statistics ======
Mean    Δp: -0.277 ± 0.024 %
RMS Δp    :  3.588 ± 0.041 %
Same top p: 92.750 ± 0.172 %
"""  # noqa: E501


@pytest.fixture(scope="module")
def llamacpp() -> Iterator[ModuleType]:
    sys.path.append(PEERS)
    import llamacpp

    yield llamacpp
    sys.path.remove(PEERS)


@pytest.fixture(scope="module")
def gguf_files(llamacpp: ModuleType) -> ModuleType:
    import gguf_files

    return gguf_files


def test_figures_of_llama_perplexity(llamacpp: ModuleType) -> None:
    assert llamacpp.parse_divergence(RECORDED) == llamacpp.Divergence(
        kld=0.017670, kld_error=0.000143, top1=92.750, top1_error=0.172, perplexity=9.987483, base_perplexity=9.772810
    )


@pytest.mark.parametrize("label", ["Mean    KLD", "Same top p", "Mean PPL(Q) ", "Mean PPL(base) "])
def test_a_figure_that_was_not_printed(llamacpp: ModuleType, label: str) -> None:
    cut = "\n".join(line for line in RECORDED.splitlines() if not line.startswith(label))
    with pytest.raises(llamacpp.ToolError, match="llama-perplexity printed no"):
        llamacpp.parse_divergence(cut)


def test_a_tool_that_is_missing_and_one_that_fails(llamacpp: ModuleType, tmp_path: Path) -> None:
    tools = llamacpp.LlamaCpp(tmp_path)
    with pytest.raises(llamacpp.ToolError, match=r"llama-quantize: missing; .*--llamacpp"):
        tools.quantize(tmp_path / "a", tmp_path / "b", "Q4_K_M", None)
    (tmp_path / "llama-quantize").write_text("#!/bin/sh\necho no such mix\nexit 3\n")
    (tmp_path / "llama-quantize").chmod(0o755)
    with pytest.raises(llamacpp.ToolError, match="llama-quantize ended with 3:\nno such mix"):
        tools.quantize(tmp_path / "a", tmp_path / "b", "Q4_K_M", None)


def test_output_lost_by_the_tool_is_asked_for_again(llamacpp: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "whole").write_text(RECORDED)
    script = f"#!/bin/sh\ncd {tmp_path}\nif [ -e second ]; then cat whole; else head -5 whole; touch second; fi\n"
    (tmp_path / "llama-perplexity").write_text(script)
    (tmp_path / "llama-perplexity").chmod(0o755)
    assert llamacpp.LlamaCpp(tmp_path).divergence(tmp_path / "file", tmp_path / "logits").kld == 0.017670


def write(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_differs_between_two_files(gguf_files: ModuleType, tmp_path: Path) -> None:
    a, b = np.zeros((64, 1024), np.float16), np.zeros((64,), np.float32)
    stock = write(tmp_path / "stock.gguf", {"a": a, "b": b})
    assert gguf_files.differences(stock, write(tmp_path / "same.gguf", {"b": b, "a": a + 1})) == ""
    other = gguf_files.differences(stock, write(tmp_path / "other.gguf", {"a": a.view(np.int16), "c": b}))
    assert other.startswith("a ('I16', (1024, 64)), stock ('F16', (1024, 64)); b None, stock ('F32', (64,)); c (")
    larger = gguf_files.differences(stock, write(tmp_path / "larger.gguf", {"a": np.zeros((65, 1024), np.float16)}))
    assert larger.endswith("bytes, stock 131,488")
