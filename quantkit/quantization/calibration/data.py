"""Calibration text -> token batches [samples, seq_len].

A text file is one stream of tokens, exactly `tokenizer(text, add_special_tokens=False)`. A file of records (JSON, CSV,
parquet), a folder saved by `datasets.save_to_disk` or a Hub data set NAME[:CONFIG[:SPLIT]] (streamed) gives one
document per row: its `text`, or its `messages` put through the chat template.

packing concat: documents follow each other, each closed by the tokenizer's end-of-text token where it has one, and are
cut into consecutive windows. packing document: the first seq_len tokens of one document each, with the special tokens
the tokenizer puts at a document's start; shorter documents are skipped. A text file's documents are then the parts
between `<|endoftext|>`.

Which windows: seed null takes the first ones and reads no further than that. Any other seed draws from the first
POOL times as many as are asked for, kept in their order. So a file of any size costs bounded time and memory.
"""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.quantization.calibration import records
from quantkit.quantization.calibration.records import local_path
from quantkit.recipe.sections import Calibration

POOL = 16  # windows to draw from, per window asked for
GUESS = 6  # characters per token read at first
TAIL = 256  # tokens before a cut in the text that the cut may have changed
BATCH = 64  # documents tokenized at once
SEPARATOR = "<|endoftext|>"
ROLES = {"human": "user", "gpt": "assistant"}
FEW_TOKENS = 4096  # fewer are reported: statistics of so few depend on chance


@dataclass(frozen=True, slots=True)
class Document:
    """One text, where it came from, and whether special tokens are already written in it (chat templates do that)."""

    text: str
    templated: bool = False


def token_batches(
    calibration: Calibration,
    tokenizer: Any,
    *,
    max_positions: int | None = None,
    notes: list[str] | None = None,
) -> Tensor:
    """The calibration tokens, int64 [samples, seq_len]; the same recipe, file and tokenizer give the same tokens.

    max_positions is the model's longest sequence. Remarks for the report (documents skipped) are appended to notes.
    Raises UserError for missing, empty, too short, non-UTF-8 or malformed data, naming file and line or byte.
    """
    samples, seq_len = calibration.samples, calibration.seq_len
    path = check_calibration(calibration, max_positions)
    pool = samples if calibration.seed is None else samples * POOL
    text_file = path is not None and not path.is_dir() and records.file_kind(path) == "text"
    notes = [] if notes is None else notes
    if calibration.packing == "document":
        documents = _text_documents(path) if text_file and path else _documents(calibration.data, path, tokenizer)
        windows = _document_windows(documents, tokenizer, seq_len, pool, calibration, notes)
    else:
        if text_file and path:
            ids = _stream_ids(path, tokenizer, pool * seq_len)
        else:
            ids = _joined_ids(_documents(calibration.data, path, tokenizer), tokenizer, pool * seq_len)
        if len(ids) < samples * seq_len:
            raise UserError(_too_short(calibration, len(ids)))
        windows = [ids[i : i + seq_len] for i in range(0, min(len(ids), pool * seq_len) - seq_len + 1, seq_len)]
    chosen = range(samples)
    if calibration.seed is not None:
        chosen = sorted(random.Random(calibration.seed).sample(range(len(windows)), samples))
    if samples * seq_len < FEW_TOKENS:
        notes.append(
            f"calibration: only {samples * seq_len} tokens ({samples} x {seq_len}): what is measured on so few depends "
            f"on chance; raise calibration.samples or seq_len to {FEW_TOKENS} tokens or more"
        )
    return torch.tensor([windows[i] for i in chosen], dtype=torch.int64)


def check_calibration(calibration: Calibration, max_positions: int | None) -> Path | None:
    """The local file or folder of the calibration text; None for a Hub data set.

    UserError where it is missing, or seq_len is above max_positions, the model's longest sequence.
    """
    seq_len = calibration.seq_len
    if max_positions is not None and seq_len > max_positions:
        raise UserError(f"calibration.seq_len {seq_len} is above the model's longest sequence: at most {max_positions}")
    return local_path(calibration.data)


def data_fingerprint(tokens: Tensor) -> str:
    """sha256 of a token tensor's bytes (int64, contiguous) and shape."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encode(tokenizer: Any, texts: Any, special: bool) -> Any:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _stream_ids(path: Path, tokenizer: Any, need: int) -> list[int]:
    """At least `need` tokens of one text file, or all there are, exactly as tokenizing the whole file begins.

    The text is cut after a guess of characters, with TAIL tokens to spare as the cut can change the last ones; too few
    tokens double the guess. Tokenizers decide locally, so the rest of the file has no say in the tokens kept.
    """
    characters = GUESS * (need + TAIL)
    while True:
        text = records.read_text(path, characters)
        ids = _encode(tokenizer, text, special=False)
        if len(text) < characters:
            return ids
        if len(ids) >= need + TAIL:
            return ids[:need]
        characters *= 2


def _text_documents(path: Path) -> Iterator[Document]:
    for part in records.read_text(path).split(SEPARATOR):
        if part.strip():
            yield Document(part.strip("\n"))


def _documents(data: str, path: Path | None, tokenizer: Any) -> Iterator[Document]:
    """Documents of a file of records, a `datasets` folder or a Hub data set, in order; blank ones are left out."""
    for place, row in records.rows(data, path):
        document = _document(place, row, tokenizer)
        if document.text.strip():
            yield document


def _document(place: str, row: Any, tokenizer: Any) -> Document:
    if not isinstance(row, dict):
        raise UserError(f'{place}: must be an object like {{"text": ...}} or {{"messages": [...]}}')
    messages = next((row[key] for key in ("messages", "conversations") if isinstance(row.get(key), list)), None)
    text, templated = row.get("text"), False
    if text is None and messages is None and "text" in row:
        text = ""
    if not isinstance(text, str):
        if messages is None:
            has = ", ".join(map(str, row)) or "no keys"
            raise UserError(f"{place}: has neither `text` (text) nor `messages` (a list), only: {has}")
        text, templated = _templated(place, messages, tokenizer), True
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text holds half a character (a lone surrogate); repair or remove it") from None
    return Document(text, templated)


def _templated(place: str, messages: list[Any], tokenizer: Any) -> str:
    """Messages as the model's chat template writes them; ShareGPT's from and value are role and content."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(f"{place}: `messages` need a chat template, and the model's tokenizer has none: give `text`")
    turns = [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, dict) and isinstance(turn.get("from"), str)
        else turn
        for turn in messages
    ]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # the template is the model's own program: whatever it raises is about this row
        raise UserError(f"{place}: the chat template refuses these messages: {error}") from error


def _batches(documents: Iterable[Document], tokenizer: Any, special: bool) -> Iterator[list[int]]:
    """Tokens of each document, up to BATCH of a kind tokenized at once."""
    for templated, alike in itertools.groupby(documents, key=lambda document: document.templated):
        while texts := [document.text for document in itertools.islice(alike, BATCH)]:
            yield from _encode(tokenizer, texts, special and not templated)


def _joined_ids(documents: Iterable[Document], tokenizer: Any, need: int) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for tokens in _batches(documents, tokenizer, special=False):
        ids += tokens
        ids += end
        if len(ids) >= need:
            break
    return ids


def _document_windows(
    documents: Iterable[Document], tokenizer: Any, seq_len: int, pool: int, calibration: Calibration, notes: list[str]
) -> list[list[int]]:
    windows: list[list[int]] = []
    skipped = longest = 0
    for tokens in _batches(documents, tokenizer, special=True):
        longest = max(longest, len(tokens))
        if len(tokens) < seq_len:
            skipped += 1
        else:
            windows.append(tokens[:seq_len])
        if len(windows) == pool:
            break
    if len(windows) < calibration.samples:
        raise UserError(
            f"{calibration.data}: {len(windows)} of {len(windows) + skipped} documents have {seq_len} tokens, "
            f"{calibration.samples} are needed; the longest has {longest}. Ask for fewer samples, a shorter seq_len, "
            "or packing: concat, which joins documents"
        )
    if skipped:
        notes.append(f"calibration: {skipped} documents shorter than {seq_len} tokens were skipped")
    return windows


def _too_short(calibration: Calibration, have: int) -> str:
    samples, seq_len = calibration.samples, calibration.seq_len
    if not have:
        return f"{calibration.data}: there is no text in it"
    fits = []
    if have >= seq_len:
        fits.append(f"samples: {have // seq_len}")
    if have // samples >= 8:
        fits.append(f"seq_len: {have // samples}")
    hint = f"; {' or '.join(fits)} would fit" if fits else "; give a longer text, or lower samples and seq_len"
    return f"{calibration.data}: {have} tokens, {samples} x {seq_len} = {samples * seq_len} are needed{hint}"
