"""The tokenizer's keys: what llama.cpp (October 2026) stops at, and what makes it cut text into other tokens."""

from collections import Counter
from typing import Any

from quantkit.checkpoint.gguf_header import GgufFile
from quantkit.verification.findings import Finding, error, info, warning

_AGAIN = "convert the model again"
_MODELS = {
    *("none", "no_vocab", "llama", "bert", "gpt2", "hybriddna", "whitespace", "t5", "rwkv", "test", "plamo2", "gemma4")
}
_BYTE_PAIRS = ("gpt2", "hybriddna", "whitespace")
# The names of tokenizer.ggml.pre that it knows.
PRE_TOKENIZERS = {
    *("default", "minicpm5", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
    *("lfm2", "jina-v5-nano", "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "youtu", "falcon"),
    *("mpt", "starcoder", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de"),
    *("a.x-4.0", "mellum", "modern-bert", "jais-2", "gemma4", "granite-embed-multi-311m", "sarvam-moe"),
    *("jina-v1-en", "jina-v2-code", "roberta-bpe", "whitespace", "refact", "command-r", "qwen2"),
    *("deepseek-r1-qwen", "kormo", "f2llmv2", "qwen35", "stablelm2", "olmo", "dbrx", "smaug-bpe", "poro-chat"),
    *("chatglm-bpe", "glm4", "glm5", "viking", "jais", "tekken", "smollm", "codeshell", "bloom", "gpt3-finnish"),
    *("exaone", "exaone4", "exaone-moe", "chameleon", "minerva-7b", "megrez", "gpt-4o", "llama4", "kanana2"),
    *("talkie", "granite-embed-multi-97m", "tiny_aya", "cohere2moe", "superbpe", "trillion", "granite-docling"),
    *("bailingmoe", "bailingmoe2", "llada-moe", "seed-coder", "hunyuan", "hunyuan-dense", "hy_v4", "joyai-llm"),
    *("kimi-k2", "ufakzeka", "grok-2", "afmoe", "laguna", "minimax-m2", "solar-open", "mellum2"),
}
_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")  # the third last is spelled so


def check_tokenizer(file: GgufFile) -> list[Finding]:
    """Findings about the keys tokenizer.*."""
    metadata = file.metadata
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return [error("gguf-key", "tokenizer.ggml.model", "this key is required and missing", _AGAIN)]
    if model not in _MODELS:
        return [error("gguf-tokenizer", "tokenizer.ggml.model", f"{model!r} is no kind of tokenizer it knows", _AGAIN)]
    if model in ("none", "no_vocab"):
        message = "the file has no tokenizer: it takes token ids, and no text"
        return [info("gguf-tokenizer", "tokenizer.ggml.model", message, "convert it with its tokenizer for text")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if file.metadata_types.get("tokenizer.ggml.tokens") != "string[]" or not isinstance(tokens, list):
        return [error("gguf-tokenizer", "tokenizer.ggml.tokens", "there is no list of tokens", _AGAIN)]
    found = []
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        message = f"{twice!r} is there twice: llama.cpp stops at such a list"
        found.append(error("gguf-tokenizer", "tokenizer.ggml.tokens", message, _AGAIN))
    found += _check_lengths(file, len(tokens)) + _check_special(metadata, len(tokens))
    if model in _BYTE_PAIRS:
        found += _check_pairs(file)
    if "tokenizer.chat_template" not in metadata:
        message = "there is no chat template: programs that chat take a default one, which other words mark turns in"
        found.append(info("gguf-template", "tokenizer.chat_template", message, "none is needed for a base model"))
    return found


def _check_lengths(file: GgufFile, count: int) -> list[Finding]:
    found = []
    for name, kinds in (("scores", ("f32[]", "i32[]")), ("token_type", ("i32[]",))):
        key = f"tokenizer.ggml.{name}"
        values = file.metadata.get(key)
        if values is None:
            if file.metadata["tokenizer.ggml.model"] == "llama":
                message = "sentencepiece needs it: without, text is cut into other tokens"
                found.append(warning("gguf-tokenizer", key, message, _AGAIN))
        elif file.metadata_types[key] not in kinds:
            message = f"it is {file.metadata_types[key]}, and is read as {kinds[0]}"
            found.append(error("gguf-tokenizer", key, message, _AGAIN))
        elif len(values) < count:
            message = f"{len(values)} entries for {count} tokens"
            found.append(error("gguf-tokenizer", key, message, _AGAIN))
        elif len(values) > count:
            message = f"{len(values)} entries for {count} tokens: the rest is not read"
            found.append(warning("gguf-tokenizer", key, message, _AGAIN))
    return found


def _check_special(metadata: dict[str, Any], count: int) -> list[Finding]:
    keys = [f"tokenizer.ggml.{name}_token_id" for name in _SPECIAL]
    wrong = [key for key in keys if key in metadata and not (isinstance(v := metadata[key], int) and 0 <= v < count)]
    message = "it names token {}, and there are {}: it is ignored"
    return [warning("gguf-tokenizer", key, message.format(metadata[key], count), _AGAIN) for key in wrong]


def _check_pairs(file: GgufFile) -> list[Finding]:
    found, pre = [], file.metadata.get("tokenizer.ggml.pre")
    if file.metadata_types.get("tokenizer.ggml.merges") != "string[]":
        message = "byte pairs cannot be merged without their list"
        found.append(error("gguf-tokenizer", "tokenizer.ggml.merges", message, _AGAIN))
    if pre is None or pre == "":
        message = "no key says how text is split before byte pairs are merged: tokens will differ from the original's"
        remedy = "convert it again, or start llama.cpp with --override-kv tokenizer.ggml.pre=str:NAME"
        found.append(warning("gguf-pre", "tokenizer.ggml.pre", message, remedy))
    elif pre not in PRE_TOKENIZERS:
        message = f"llama.cpp of October 2026 knows no way of splitting text that is called {pre!r}"
        found.append(error("gguf-pre", "tokenizer.ggml.pre", message, "take a newer llama.cpp, or convert it again"))
    elif pre == "default":
        message = "text is split in llama.cpp's default way, which hardly any model was trained with"
        found.append(warning("gguf-pre", "tokenizer.ggml.pre", message, _AGAIN))
    return found
