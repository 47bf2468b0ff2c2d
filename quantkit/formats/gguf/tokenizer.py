"""All `tokenizer.*` keys of a GGUF file, from the tokenizer of a Hugging Face folder.

`tokenizer.ggml.model` is "gpt2" for byte-level BPE and "llama" for sentencepiece's BPE with byte fallback. llama.cpp
must make the same tokens of any text: that is tried on 300 strings here, and what it cannot do alike is refused.
"""

from pathlib import Path

from quantkit.checkpoint.gguf_writer import KeyValue
from quantkit.errors import UserError
from quantkit.formats.gguf import pre as pre_tokenizer
from quantkit.formats.gguf.model_name import fitting_name
from quantkit.formats.gguf.pre_probe import PROBE
from quantkit.formats.gguf.special_tokens import chat_templates, special_tokens
from quantkit.formats.gguf.spm_scores import llama_tokens, scores_of_merges
from quantkit.formats.gguf.token_list import SPECIAL, TokenList, check_rows, token_list
from quantkit.formats.gguf.vocabulary import BPE_ONLY, SPACE, Vocabulary, load_vocabulary


def tokenizer_metadata(
    folder: Path, vocab_size: int, *, pre: str | None = None, name: str | None = None
) -> dict[str, KeyValue]:
    """The tokenizer's keys and values for a model of `vocab_size` embedding rows.

    With the model's `name` general.name is among them, as `fitting_name` has it.

    Fewer tokens than rows: padded with unused tokens. More: added tokens without a row are left out (the model has
    never seen them). `pre` is written as given instead of what the tokenizer shows. UserError for what is not BPE,
    that cuts or merges as nothing in llama.cpp does, or whose own vocabulary has more tokens than the model has rows.
    """
    if pre is not None:
        pre_tokenizer.check_name(pre)
    vocabulary = load_vocabulary(folder)
    tokens = token_list(vocabulary, vocab_size)
    kind = _byte_level(vocabulary, tokens, pre) if vocabulary.byte_level else _sentencepiece(vocabulary, tokens, pre)
    named = {} if name is None else {"general.name": ("string", _name(name, vocabulary, tokens))}
    return named | kind | special_tokens(vocabulary, vocab_size) | chat_templates(vocabulary)


def _name(name: str, vocabulary: Vocabulary, tokens: TokenList) -> str:
    special = [text for text, kind in zip(tokens.texts, tokens.types, strict=True) if kind in SPECIAL]
    swallowing = {token.content for token in vocabulary.added.values() if token.rstrip}
    return fitting_name(name, tokens.texts, special, swallowing)


def check_tokenizer(folder: Path, vocab_size: int, *, pre: str | None = None) -> None:
    """UserError where `tokenizer_metadata` refuses how the tokenizer cuts, merges or counts; much faster.

    Neither transformers' tokenizer is loaded nor what it puts around a text judged.
    """
    try:
        vocabulary = load_vocabulary(folder)
        check_rows(vocabulary, vocab_size)
        added = {i: token.content for i, token in vocabulary.backend.get_added_tokens_decoder().items()}
        if not vocabulary.byte_level:
            texts = {i: text for text, i in vocabulary.model["vocab"].items()} | added
            _sentencepiece(vocabulary, TokenList([texts.get(i, "") for i in range(vocab_size)], []), pre)
        elif pre is None:
            pre_tokenizer.find_pre(vocabulary.backend, vocabulary.model, set(added.values()), folder)
    except UserError:
        tokenizer_metadata(folder, vocab_size, pre=pre)  # which may know more tokens, and has the last word


def _byte_level(vocabulary: Vocabulary, tokens: TokenList, pre: str | None) -> dict[str, KeyValue]:
    return {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pre or _found_pre(vocabulary)),
        "tokenizer.ggml.tokens": ("string[]", tokens.texts),
        "tokenizer.ggml.token_type": ("i32[]", tokens.types),
        "tokenizer.ggml.merges": ("string[]", [f"{left} {right}" for left, right in vocabulary.merges]),
    }


def _found_pre(vocabulary: Vocabulary) -> str:
    added = {token.content for token in vocabulary.added.values()}
    return pre_tokenizer.find_pre(vocabulary.backend, vocabulary.model, added, vocabulary.folder)


def _sentencepiece(vocabulary: Vocabulary, tokens: TokenList, pre: str | None) -> dict[str, KeyValue]:
    prefixed = _space_prefix(vocabulary)
    scores = _scores(vocabulary, tokens)
    if pre is None:
        _check_merges(vocabulary, scores, prefixed)
    return {
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.pre": ("string", pre or "default"),
        "tokenizer.ggml.tokens": ("string[]", tokens.texts),
        "tokenizer.ggml.scores": ("f32[]", scores),
        "tokenizer.ggml.token_type": ("i32[]", tokens.types),
        "tokenizer.ggml.add_space_prefix": ("bool", prefixed),
    }


def _space_prefix(vocabulary: Vocabulary) -> bool:
    """Whether a text gets a space in front; UserError where spaces are not written as sentencepiece does."""
    if (form := vocabulary.form("a b")) not in (f"a{SPACE}b", f"{SPACE}a{SPACE}b"):
        raise UserError(
            f"{vocabulary.folder}: the tokenizer is neither byte-level nor sentencepiece's ('a b' becomes {form!r})\n"
            f"hint: {BPE_ONLY}"
        )
    return form.startswith(SPACE)


def _scores(vocabulary: Vocabulary, tokens: TokenList) -> list[float]:
    """The score of each token: tokenizer.model's, else by the order of the merges; what no merge makes is last."""
    if vocabulary.piece_scores is None:
        return scores_of_merges(tokens.texts, vocabulary.merges)
    last = min(vocabulary.piece_scores.values(), default=0.0) - 1.0
    return [vocabulary.piece_scores.get(text, last) for text in tokens.texts]


def _check_merges(vocabulary: Vocabulary, scores: list[float], prefixed: bool) -> None:
    """UserError where llama.cpp, which knows scores and no merges, would make other tokens of a string of the probe.

    Strings that begin with a space are skipped where a space is put in front: sentencepiece and llama.cpp add one to
    those too, transformers' newer classes do not.
    """
    ids = {text: i for text, i in vocabulary.model["vocab"].items() if i < len(scores)}
    differing = []
    for text in PROBE:
        if prefixed and text.startswith(" "):
            continue
        theirs = llama_tokens((SPACE if prefixed else "") + text.replace(" ", SPACE), ids, scores)
        if theirs is not None and theirs != vocabulary.merged(text):
            differing.append((text, theirs))
    if differing:
        text, theirs = differing[0]
        here = [vocabulary.texts.get(i) for i in vocabulary.merged(text)]
        raise UserError(
            f"{vocabulary.folder}: llama.cpp's sentencepiece tokenizer makes other tokens of {len(differing)} of"
            f" {len(PROBE)} strings, as {text!r}: {[vocabulary.texts.get(i) for i in theirs]} against {here} here\n"
            "hint: --pre default writes the tokenizer all the same"
        )
