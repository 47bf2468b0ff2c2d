"""Our blocks against ggml's own quantizer (ctypes on libggml-base): no more error, on random and on real weights.

Needs llama.cpp's libraries: QUANTKIT_LLAMACPP names their folder, or llama-cpp-python is installed. The ratios are
printed: pytest -m interop tests/interop/test_gguf_grids.py -s. `python -m tests.interop.test_gguf_grids` prints the
table of figures that tests/grids/test_kquant_error.py holds.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantkit.formats.gguf.block_bytes import pack
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.grids.kquants import BlockGrid
from quantkit.types import block_spec
from tests.grids.test_kquant_error import error, ours, sample

pytestmark = pytest.mark.interop
TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama" / "model.safetensors"
MATRICES = (
    "layers.0.mlp.down_proj",
    "layers.2.mlp.gate_proj",
    "layers.1.self_attn.q_proj",
    "layers.3.self_attn.v_proj",
)


def library() -> ctypes.CDLL:
    """ggml's base library, or the test is skipped."""
    places = [Path(folder) for folder in (os.environ.get("QUANTKIT_LLAMACPP"),) if folder]
    if spec := importlib.util.find_spec("llama_cpp"):
        places += [Path(folder) / "lib" for folder in spec.submodule_search_locations or ()]
    for folder in places:
        for found in (*folder.glob("libggml-base.so"), *folder.glob("libggml-base.dylib")):
            ggml = ctypes.CDLL(str(found))
            ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
            ggml.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                *[ctypes.c_void_p] * 2,
                *[ctypes.c_int64] * 3,
                ctypes.c_void_p,
            ]
            return ggml
    pytest.skip("no libggml-base: set QUANTKIT_LLAMACPP to a folder with llama.cpp's libraries")


def by_ggml(ggml: ctypes.CDLL, name: str, w_NK: np.ndarray, importance_K: np.ndarray | None) -> np.ndarray:
    """The bytes of its quantizer, uint8 [N, row bytes]."""
    w_NK, (N, K) = np.ascontiguousarray(w_NK, np.float32), w_NK.shape
    importance_K = None if importance_K is None else np.ascontiguousarray(importance_K, np.float32)
    out = np.zeros((N, GGML_TYPES[name].row_bytes(K)), np.uint8)
    pointer = None if importance_K is None else importance_K.ctypes.data
    size = ggml.ggml_quantize_chunk(GGML_TYPES[name].number, w_NK.ctypes.data, out.ctypes.data, 0, N, K, pointer)
    assert size == out.size
    return out


def search_weights(name: str, w_NK: np.ndarray, importance_K: np.ndarray) -> np.ndarray:
    """What llama.cpp's own search with importance weights squared errors with [N, K], from its source."""
    square_NK, K = w_NK.astype(np.float64) ** 2, w_NK.shape[1]
    if name in ("Q6_K", "Q8_0"):
        return np.broadcast_to(importance_K, w_NK.shape)
    times, size = {"Q2_K": (1, 256), "IQ4_NL": (2, 32)}.get(
        name, (2, 256) if GGML_TYPES[name].columns == 256 else (1, K)
    )
    mean_NK = np.repeat(square_NK.reshape(len(w_NK), -1, size).mean(2), size, 1)
    return importance_K * np.sqrt(times * mean_NK + square_NK)


def weights() -> Iterator[tuple[str, np.ndarray]]:
    yield "gaussian", sample("gaussian")
    yield "heavy-tailed", sample("heavy")
    tensors = load_file(TINY_LLAMA)
    for name in MATRICES:
        yield name, tensors[f"model.{name}.weight"].float().numpy()


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_more_error_than_ggml(name: str) -> None:
    ggml, lines, worst = library(), [], 0.0
    for label, w_NK in weights():
        importance_K = np.exp(np.random.default_rng(5).normal(size=w_NK.shape[1]) * 1.2)
        for e_K in (None, importance_K):
            theirs = gguf.quants.dequantize(by_ggml(ggml, name, w_NK, e_K), gguf.GGMLQuantizationType[name])
            found = ours(name, w_NK, e_K)
            ratio = error(found, w_NK, e_K) / error(theirs, w_NK, e_K)
            line = f"{name:7} {label:24} {'plain' if e_K is None else 'E[x^2]'} {ratio:.4f}"
            if e_K is not None:
                by_search = search_weights(name, w_NK, e_K)
                own = error(found, w_NK, by_search) / error(theirs, w_NK, by_search)
                line, worst = f"{line}, by its own weights {own:.4f}", max(worst, own)
            lines.append(line)
            worst = max(worst, ratio)
    print(*lines, sep="\n")
    assert worst <= 1.0 + 1e-6, "\n".join(lines)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_without_importance_the_bytes_of_ggml(name: str) -> None:
    ggml = library()
    for _, w_NK in weights():
        grid, w = BlockGrid(block_spec(name)), torch.from_numpy(w_NK)
        parameters = grid.fit(w)
        data = pack(grid.weight(grid.encode(w, parameters), parameters))
        assert np.array_equal(data.numpy(), by_ggml(ggml, name, w_NK, None))


if __name__ == "__main__":
    figures: dict[str, Any] = {}
    for kind in ("gaussian", "heavy"):
        w, e = sample(kind), np.exp(np.random.default_rng(5).normal(size=sample(kind).shape[1]) * 1.2)
        for type_name in QUANTIZED:
            pair = []
            for given in (None, e):
                data = by_ggml(library(), type_name, w, given)
                pair.append(error(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name]), w, given))
            figures[f"{kind} {type_name}"] = tuple(float(f"{x:.5g}") for x in pair)
    for key, value in figures.items():
        print(f'    "{key}": {value},')
