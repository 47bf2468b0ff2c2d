"""Documents and streams -> token windows of one length.

packing concat: documents follow each other, each closed by the tokenizer's end-of-text token where it has one, and are
cut into consecutive windows. packing document: the beginning of one document each. Where sequences start with a BOS
token a window of a stream is that token and seq_len - 1 tokens of the stream, or, at a chat whose template wrote it,
seq_len tokens: never two of them.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.quantization.calibration import files
from quantkit.quantization.calibration.bos import starts_with_bos
from quantkit.quantization.calibration.documents import Document

GUESS = 6  # characters per token read at first
TAIL = 256  # tokens before a cut in the text that the cut may have changed
BATCH = 64  # documents tokenized at once
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens that follow each other. bos: the token every window starts with, if any."""

    ids: list[int]
    bos: int | None = None

    def windows(self, seq_len: int) -> list[list[int]]:
        """All windows of this length, in order."""
        if self.bos is None:
            return [self.ids[i : i + seq_len] for i in range(0, len(self.ids) - seq_len + 1, seq_len)]
        found, at = list[list[int]](), 0
        while at < len(self.ids):
            before = [] if self.ids[at] == self.bos else [self.bos]
            window = before + self.ids[at : at + seq_len - len(before)]
            at += seq_len - len(before)
            if len(window) == seq_len:
                found.append(window)
        return found

    def longest(self, samples: int) -> int:
        """The greatest length of which there are `samples` windows; 0 where there is none."""
        length = len(self.ids) // samples
        if self.bos is None or length == 0:
            return length
        return length + (len(self.windows(length + 1)) >= samples)

    def best(self, most: int, tokens: int) -> int:
        """The length up to `most` whose windows come nearest to so many tokens, the greatest of several."""
        return min(most, self.longest(1))


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences of any lengths. split: a long one gives several windows, else its beginning alone.

    left_out: how many more there were, all shorter than the windows asked for, the longest of longest_left_out tokens
    """

    items: list[list[int]]
    split: bool = False
    left_out: int = 0
    longest_left_out: int = 0

    def windows(self, seq_len: int) -> list[list[int]]:
        """All windows of this length, in order."""
        if self.split:
            return [s[i : i + seq_len] for s in self.items for i in range(0, len(s) - seq_len + 1, seq_len)]
        return [s[:seq_len] for s in self.items if len(s) >= seq_len]

    def longest(self, samples: int) -> int:
        """The greatest length of which there are `samples` windows; 0 where there is none."""
        lengths = sorted(map(len, self.items), reverse=True)
        return lengths[samples - 1] if samples <= len(lengths) else 0

    def best(self, most: int, tokens: int) -> int:
        """The length up to `most` whose windows come nearest to so many tokens, the greatest of several."""
        lengths = sorted((min(len(s), most) for s in self.items), reverse=True)
        return _best(lengths, tokens) if lengths else 0

    def shorter(self, seq_len: int) -> int:
        """How many are too short for windows of this length."""
        return self.left_out + sum(len(s) < seq_len for s in self.items)


Material = Stream | Sequences


def _best(lengths: list[int], tokens: int) -> int:
    """Of lengths in falling order the first L with the greatest min(L x sequences as long, tokens)."""
    return max(enumerate(lengths, 1), key=lambda item: min(item[0] * item[1], tokens))[1]


def encode(tokenizer: Any, texts: Any, special: bool) -> Any:
    """Token ids of one text, or of a list of them."""
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def stream_ids(path: Path, tokenizer: Any, need: int) -> list[int]:
    """At least `need` tokens of one text file, or all there are, exactly as tokenizing the whole file begins.

    The text is cut after a guess of characters, with TAIL tokens to spare as the cut can change the last ones; too few
    tokens double the guess. Tokenizers decide locally, so the rest of the file has no say in the tokens kept.
    """
    characters = GUESS * (need + TAIL)
    while True:
        text = files.read_text(path, characters)
        ids = encode(tokenizer, text, special=False)
        if len(text) < characters:
            return ids
        if len(ids) >= need + TAIL:
            return ids[:need]
        characters *= 2


def text_documents(path: Path) -> Iterator[Document]:
    """The parts of a text file between SEPARATOR; blank ones are left out."""
    for part in files.read_text(path).split(SEPARATOR):
        if part.strip():
            yield Document(part.strip("\n"))


def joined_ids(documents: Iterable[Document], tokenizer: Any, setting: Any, need: int) -> list[int]:
    """At least `need` tokens of documents that follow each other, or all there are. setting: the recipe's `bos`."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for templated, tokens in _batches(documents, tokenizer, special=False):
        ids += _without_bos(tokens, tokenizer) if templated and setting is False else tokens
        ids += end
        if len(ids) >= need:
            break
    return ids


def _without_bos(tokens: list[int], tokenizer: Any) -> list[int]:
    bos = getattr(tokenizer, "bos_token_id", None)
    return tokens[1:] if bos is not None and tokens[:1] == [bos] else tokens


def document_ids(
    documents: Iterable[Document], tokenizer: Any, setting: Any, seq_len: int, pool: int
) -> Iterator[list[int]]:
    """The first seq_len tokens of each document, until `pool` of them have as many.

    setting: the recipe's `bos`. auto: with the special tokens that the tokenizer puts at a document's start.
    """
    own, bos = starts_with_bos(tokenizer, "auto"), starts_with_bos(tokenizer, setting)
    special = setting == "auto" or (setting is True and own is not None)
    full = 0
    for templated, tokens in _batches(documents, tokenizer, special):
        if bos is not None and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        elif setting is False and templated:
            tokens = _without_bos(tokens, tokenizer)
        yield tokens[:seq_len]
        full += len(tokens) >= seq_len
        if full == pool:
            break


def _batches(documents: Iterable[Document], tokenizer: Any, special: bool) -> Iterator[tuple[bool, list[int]]]:
    """(templated, tokens) of each document, up to BATCH of a kind tokenized at once."""
    for templated, alike in itertools.groupby(documents, key=lambda document: document.templated):
        while texts := [document.text for document in itertools.islice(alike, BATCH)]:
            for tokens in encode(tokenizer, texts, special and not templated):
                yield templated, tokens
