"""The texts and kinds of all tokens, one for each row of the embedding."""

import re
from dataclasses import dataclass
from enum import IntEnum

from quantkit.errors import UserError
from quantkit.formats.gguf.vocabulary import SPACE, Vocabulary


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens (tokenizer.ggml.token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)  # looked for before a text is cut
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenList:
    """Text and kind of each token; all texts differ (llama.cpp stops at two alike)."""

    texts: list[str]
    types: list[int]


def token_list(vocabulary: Vocabulary, vocab_size: int) -> TokenList:
    """`vocab_size` tokens: those of the tokenizer, unused ones named [PAD7] for the ids that it lacks.

    UserError where a token of the vocabulary itself has no row; added tokens without one are left out.
    """
    check_rows(vocabulary, vocab_size)
    produced = {left + right for left, right in vocabulary.merges}
    taken = set(vocabulary.texts.values())
    texts, types = [], []
    for i in range(vocab_size):
        text = vocabulary.texts.get(i)
        if text is None:
            text, kind = f"[PAD{i}]", TokenType.UNUSED
            while text in taken:
                text += "_"
        else:
            text, kind = _typed(vocabulary, i, text, produced, taken)
        taken.add(text)
        texts.append(text)
        types.append(int(kind))
    return TokenList(texts, types)


def check_rows(vocabulary: Vocabulary, vocab_size: int) -> None:
    """UserError where a token of the vocabulary itself has no row of the embedding."""
    largest = max(vocabulary.model["vocab"].values(), default=-1)
    if largest >= vocab_size and any(i >= vocab_size and i not in vocabulary.added for i in vocabulary.texts):
        raise UserError(
            f"{vocabulary.folder}: the tokenizer has tokens up to id {largest}, the model {vocab_size} rows\n"
            "hint: put the tokenizer files of this very model into the folder"
        )


def _typed(vocabulary: Vocabulary, i: int, text: str, produced: set[str], taken: set[str]) -> tuple[str, TokenType]:
    """The text that llama.cpp looks for and the kind of token `i`.

    Added tokens are looked for in the text before it is cut: user-defined ones always, control tokens where the caller
    allows it. sentencepiece's runs of spaces (Gemma) are among the added ones, but merges make them of spaces too: as
    normal tokens they are found and printed as spaces.
    """
    added = vocabulary.added.get(i)
    if not vocabulary.byte_level and text == vocabulary.unknown:
        return text, TokenType.UNKNOWN
    if added is None:
        is_byte = not vocabulary.byte_level and BYTE_TOKEN.fullmatch(text)
        return text, TokenType.BYTE if is_byte else TokenType.NORMAL
    if added.special:
        return text, TokenType.CONTROL
    if vocabulary.byte_level or SPACE not in text:
        return text, TokenType.USER_DEFINED
    if text in produced:
        return text, TokenType.NORMAL
    spaced = text.replace(SPACE, " ")
    return (text if spaced in taken else spaced), TokenType.USER_DEFINED
