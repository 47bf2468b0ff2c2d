"""llama.cpp for the interop tests: where its tools and its Python binding are, and what it computes of a file.

The tools are looked for in the folder QUANTKIT_LLAMACPP, then on PATH; the binding is llama-cpp-python, if installed.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TOOLS = "QUANTKIT_LLAMACPP"


def tool(name: str) -> Path:
    """A program of llama.cpp ("llama-quantize"), or the test is skipped."""
    folder = os.environ.get(TOOLS)
    found = Path(folder) / name if folder else shutil.which(name)
    if found is None or not Path(found).exists():
        pytest.skip(f"no {name}: set {TOOLS} to a folder with llama.cpp's programs")
    return Path(found)


def binding() -> ModuleType:
    """llama-cpp-python, or the test is skipped."""
    if (folder := os.environ.get(TOOLS)) and (Path(folder) / "libllama.so").exists():
        os.environ.setdefault("LLAMA_CPP_LIB_PATH", folder)
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def logits(path: Path, tokens: Sequence[int]) -> np.ndarray:
    """llama.cpp's logits [T, V], float32, of a file for token ids; its cache of keys and values is float32 too."""
    llama_cpp = binding()
    with plain_buffers(llama_cpp):
        llm = _model(llama_cpp, path, tokens)
    try:
        llm.eval(list(tokens))
        return np.array(llm.scores[: len(tokens)], np.float32)
    finally:
        llm.close()


@contextmanager
def plain_buffers(llama_cpp: ModuleType) -> Iterator[None]:
    """Models loaded here keep their blocks as they are: layouts for AMX crash where the kernel forbids its tiles."""
    low = llama_cpp.llama_cpp
    default = low.llama_model_default_params

    def plain() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    low.llama_model_default_params = plain
    try:
        yield
    finally:
        low.llama_model_default_params = default


def _model(llama_cpp: ModuleType, path: Path, tokens: Sequence[int]) -> Any:
    return llama_cpp.Llama(
        str(path),
        n_ctx=max(256, len(tokens)),
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
        flash_attn=False,
    )


def write_f32(path: Path, metadata: Mapping[str, tuple[str, Any]], tensors: Mapping[str, np.ndarray]) -> None:
    """A GGUF file of float32 tensors by the gguf package's own writer; without a tokenizer unless metadata has one."""
    import gguf

    kinds = {
        "u32": gguf.GGUFValueType.UINT32,
        "i32": gguf.GGUFValueType.INT32,
        "f32": gguf.GGUFValueType.FLOAT32,
        "bool": gguf.GGUFValueType.BOOL,
        "string": gguf.GGUFValueType.STRING,
    }
    writer = gguf.GGUFWriter(path, metadata["general.architecture"][1])
    for key, (kind, value) in ({"tokenizer.ggml.model": ("string", "none")} | dict(metadata)).items():
        if key == "general.architecture":  # the writer adds it
            continue
        if kind.endswith("[]"):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, kinds[kind.removesuffix("[]")])
        else:
            writer.add_key_value(key, value, kinds[kind])
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
