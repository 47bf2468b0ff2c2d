"""What each engine makes of a GGUF file: llama.cpp of October 2026, transformers 5.24, vLLM 0.33, SGLang 0.5.23."""

from collections.abc import Callable

from quantkit.checkpoint.gguf_header import GgufFile
from quantkit.verification.engines.hardware import HARDWARE
from quantkit.verification.findings import Finding, error, info, warning
from quantkit.verification.gguf.architectures import ARCHITECTURES
from quantkit.verification.subject import some

_LLAMA_CPP = "load it with llama.cpp"
# What transformers rebuilds a configuration for. SGLang and vLLM's plugin take theirs from it.
_TRANSFORMERS = {
    *("llama", "mistral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "gemma4", "gpt2"),
    *("falcon", "bloom", "starcoder2", "stablelm", "nemotron", "t5", "t5encoder", "mamba", "deci", "gpt-oss", "lfm2"),
    *("minimax-m2", "qwen35", "qwen35moe"),
}
_NOT_IN_GGUF_PY = ("Q1_0", "Q2_0")  # the gguf package 0.19 of PyPI
_NOT_IN_SGLANG = ("MXFP4", "NVFP4", "TQ1_0", "TQ2_0", *_NOT_IN_GGUF_PY)
# Sizes that transformers does not read from the file: architecture, key, the value its configuration has anyway.
_DEFAULTS = (
    ("qwen3", "attention.key_length", 128),
    ("qwen3moe", "expert_feed_forward_length", 768),
)


def check_engine(file: GgufFile, engine: str) -> list[Finding]:
    """Findings of one engine, beside those that concern every reader."""
    return _RULES[engine](file)


def known_to(file: GgufFile, engine: str) -> bool:
    """Whether an engine's answer can be judged here: its rules or the tables know the architecture."""
    return engine != "llama.cpp" or file.metadata["general.architecture"] in ARCHITECTURES


def hardware_of(engine: str) -> dict[str, str]:
    """What each kind of machine does with any GGUF type."""
    if engine == "llama.cpp":
        return dict.fromkeys(HARDWARE, "yes")
    if engine == "sglang":
        return {name: "no" if name in ("CPU", "XPU", "ROCm") else "yes" for name in HARDWARE}
    return {}


def _llama_cpp(file: GgufFile) -> list[Finding]:
    name = file.metadata["general.architecture"]
    if name in ARCHITECTURES:
        return []
    message = f"quantkit has no table of the keys and tensors of {name!r}: they were not judged"
    return [info("gguf-architecture", "general.architecture", message, "load it to find out")]


def _transformers(file: GgufFile) -> list[Finding]:
    found = _single_file(file, "transformers") + _architecture(file, "transformers")
    found += _types(file, _NOT_IN_GGUF_PY, "the gguf package that transformers reads with has no type {}")
    prefix = file.metadata["general.architecture"]
    for name, key, default in _DEFAULTS:
        value = file.metadata.get(f"{prefix}.{key}", default)
        if prefix == name and value != default:
            message = f"it is {value}, transformers does not read it and takes {default}: weights do not fit"
            found.append(error("gguf-config", f"{prefix}.{key}", message, _LLAMA_CPP))
    found += _phi3_padding(file) + _gemma3_scale(file)
    scaled = [name for name in file.tensors if name.startswith("rope_f")]
    scaled += [f"{prefix}.rope.scaling.type"] if file.metadata.get(f"{prefix}.rope.scaling.type") else []
    if scaled:
        message = "transformers does not read how positions are scaled: it loads, with wrong results"
        found.append(warning("gguf-rope-scaling", some(scaled), message, f"{_LLAMA_CPP} or quantkit.load"))
    if prefix == "llama" and "blk.0.attn_q.bias" in file.tensors:
        message = "transformers builds a Llama without biases: it loads, with wrong results"
        found.append(warning("gguf-bias", "blk.0.attn_q.bias", message, f"{_LLAMA_CPP} or quantkit.load"))
    message = "transformers dequantizes every weight while loading: it takes the memory of the original model"
    return [*found, info("gguf-dense", "", message, "pass gguf_file= to from_pretrained")]


def _phi3_padding(file: GgufFile) -> list[Finding]:
    """transformers' Phi3 pads with token 32000 where no key names another, and stops where there is no such row."""
    key, table = "tokenizer.ggml.padding_token_id", file.tensors.get("token_embd.weight")
    if (
        file.metadata["general.architecture"] != "phi3"
        or key in file.metadata
        or table is None
        or table.shape[0] > 32000
    ):
        return []
    message = f"there is none, transformers takes 32000, and the embedding has {table.shape[0]} rows: it stops"
    return [error("gguf-config", key, message, _LLAMA_CPP)]


def _gemma3_scale(file: GgufFile) -> list[Finding]:
    """transformers divides by the root of 256 in attention, whatever the size of heads; llama.cpp's 27B has 168."""
    metadata, key = file.metadata, "gemma3.attention.key_length"
    if metadata["general.architecture"] != "gemma3" or (
        metadata.get(key) == 256 and metadata.get("gemma3.block_count") != 62
    ):
        return []
    message = "transformers scales attention as for heads of 256 features: it loads, with wrong results"
    return [warning("gguf-config", key, message, f"{_LLAMA_CPP} or quantkit.load")]


def _vllm(file: GgufFile) -> list[Finding]:
    message = "vLLM 0.33 reads gguf only with the plugin vllm-gguf-plugin"
    return [error("method", "", message, "install vllm-gguf-plugin, or quantize the original model for vLLM")]


def _sglang(file: GgufFile) -> list[Finding]:
    found = _single_file(file, "SGLang") + _architecture(file, "SGLang")
    found += _types(file, _NOT_IN_SGLANG, "SGLang multiplies with no {}")
    return [*found, info("gguf-flag", "", "SGLang takes it on CUDA alone", "pass --load-format gguf")]


def _tensorrt_llm(file: GgufFile) -> list[Finding]:
    return [error("method", "", "TensorRT-LLM reads no GGUF files", "quantize the original model for it")]


def _single_file(file: GgufFile, engine: str) -> list[Finding]:
    if len({tensor.path for tensor in file.tensors.values()}) < 2:
        return []
    remedy = "merge them with llama.cpp's llama-gguf-split --merge"
    return [error("gguf-shards", file.path.name, f"{engine} reads a single file, and these are shards", remedy)]


def _architecture(file: GgufFile, engine: str) -> list[Finding]:
    name = file.metadata["general.architecture"]
    if name in _TRANSFORMERS:
        return []
    message = f"{engine} rebuilds no configuration of {name!r}"
    return [error("gguf-architecture", "general.architecture", message, _LLAMA_CPP)]


def _types(file: GgufFile, types: tuple[str, ...], message: str) -> list[Finding]:
    wrong = [tensor.name for tensor in file.tensors.values() if tensor.type in types]
    if not wrong:
        return []
    return [error("gguf-type", some(wrong), message.format(file.tensors[wrong[0]].type), _LLAMA_CPP)]


_RULES: dict[str, Callable[[GgufFile], list[Finding]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
    "tensorrt-llm": _tensorrt_llm,
}
