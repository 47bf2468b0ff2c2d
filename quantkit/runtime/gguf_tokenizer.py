"""The tokenizer of a GGUF file: from its keys, as llama.cpp cuts text, or the folder's own where the keys do not do.

llama.cpp joins the neighbours with the highest score, or by the list of merges: both are byte-pair encoding.
"""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quantkit.checkpoint.gguf_file import open_gguf
from quantkit.checkpoint.model_folder import TOKENIZERS
from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.errors import UserError
from quantkit.formats.gguf.pre_table import PRE_TOKENIZERS
from quantkit.formats.gguf.spm_scores import pairs_of_pieces

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
# What llama.cpp does to byte pairs where no key names another way.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
)
# Names of tokenizer.ggml.pre with which it puts BOS before a text if no key says otherwise.
_WITH_BOS = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    *("tekken", "chameleon"),
}
_PADDING = re.compile(r"\[PAD\d+\]")  # rows of the embedding that no token has


class _NoTokenizerError(Exception):
    """Why the keys describe no tokenizer that can be built."""


def gguf_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer of a GGUF file, and a remark where it is not the file's own.

    UserError where its keys describe none that is known here, and no tokenizer lies in its folder.
    """
    file = open_gguf(path)
    try:
        return _build(file.metadata), None
    except _NoTokenizerError as problem:
        folder = path.parent
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise UserError(
                f"{path}: {problem}\n"
                "hint: copy tokenizer.json and tokenizer_config.json of the original model into the file's folder"
            ) from problem
        return locate_tokenizer(folder, False), f"the tokenizer is that of {folder}, not the file's own: {problem}"


def _build(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens, model = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise _NoTokenizerError(f"tokenizer.ggml.model is {model!r}, of which quantkit builds no tokenizer")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise _NoTokenizerError("tokenizer.ggml.tokens is no list of different tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(kinds) < len(tokens):
        raise _NoTokenizerError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    vocabulary = {
        token: index for index, token in enumerate(tokens) if not (kinds[index] == UNUSED and _PADDING.fullmatch(token))
    }
    try:
        backend = (_byte_pairs if model == "gpt2" else _sentencepiece)(metadata, vocabulary)
    except _NoTokenizerError:
        raise
    except Exception as error:  # the library's own, for merges of what is no token
        raise _NoTokenizerError(f"its tokens and merges do not fit together ({error})") from error
    backend.add_special_tokens([_added(token) for token, i in vocabulary.items() if kinds[i] == CONTROL])
    backend.add_tokens([_added(token) for token, i in vocabulary.items() if kinds[i] == USER_DEFINED])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{name}_token": _special(metadata, key, tokens) for name, key in names.items()}
    _add_bos(backend, metadata, special["bos_token"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        **{name: token for name, token in special.items() if token is not None},
    )
    wrapped.clean_up_tokenization_spaces = False
    return wrapped


def _byte_pairs(metadata: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    merges, pre = metadata.get("tokenizer.ggml.merges"), metadata.get("tokenizer.ggml.pre") or "default"
    if not isinstance(merges, list):
        raise _NoTokenizerError("tokenizer.ggml.merges is missing")
    known = {name: entry for entry in PRE_TOKENIZERS for name in entry.names}
    if pre not in known and pre != "default":
        raise _NoTokenizerError(f"how tokenizer.ggml.pre {pre!r} splits text is not known here")
    regexes = known[pre].regexes if pre in known else _DEFAULT
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    ignore = pre in known and known[pre].ignore_merges
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore))
    splits: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def _sentencepiece(metadata: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    scores, kinds = metadata.get("tokenizer.ggml.scores"), metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(scores, list) or len(scores) <= max(vocabulary.values(), default=0):
        raise _NoTokenizerError("tokenizer.ggml.scores is missing or too short")
    pieces = {token: scores[i] for token, i in vocabulary.items() if not kinds or kinds[i] not in (CONTROL, UNKNOWN)}
    unknown = next((token for token, i in vocabulary.items() if kinds and kinds[i] == UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary, merges=pairs_of_pieces(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])  # type: ignore[assignment]
    ends = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*ends, *([decoders.Strip(" ", 1, 0)] if steps else [])])  # type: ignore[assignment]
    return backend


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=False)


def _special(metadata: dict[str, Any], key: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _add_bos(backend: Tokenizer, metadata: dict[str, Any], bos: str | None) -> None:
    """Put BOS before a text where llama.cpp does."""
    usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _WITH_BOS
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", usual):
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
