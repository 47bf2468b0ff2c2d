"""Calibration text -> token batches [samples, seq_len].

What `data` may be: a text file (one stream of tokens, exactly `tokenizer(text, add_special_tokens=False)`), a .jsonl
file (one document per line: `text`, or `messages` put through the chat template), a folder saved by
`datasets.save_to_disk`, or a Hub data set NAME[:CONFIG[:SPLIT]] (streamed).

packing concat: documents follow each other, each closed by the tokenizer's end-of-text token where it has one, and are
cut into consecutive windows. packing document: the first seq_len tokens of one document each, with the special tokens
the tokenizer puts at a document's start; shorter documents are skipped. A text file's documents are then the parts
between `<|endoftext|>`.

Which windows: seed null takes the first ones and reads no further than that. Any other seed draws from the first
POOL times as many as are asked for, kept in their order. So a file of any size costs bounded time and memory.
"""

import codecs
import difflib
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.recipe.sections import Calibration

POOL = 16  # windows to draw from, per window asked for
GUESS = 6  # characters per token read at first
TAIL = 256  # tokens before a cut in the text that the cut may have changed
BATCH = 64  # documents tokenized at once
SEPARATOR = "<|endoftext|>"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


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
    if max_positions is not None and seq_len > max_positions:
        raise UserError(f"calibration.seq_len {seq_len} is above the model's longest sequence: at most {max_positions}")
    pool = samples if calibration.seed is None else samples * POOL
    path = local_path(calibration.data)
    text_file = path is not None and path.is_file() and path.suffix.lower() not in (".jsonl", ".ndjson")
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
    return torch.tensor([windows[i] for i in chosen], dtype=torch.int64)


def data_fingerprint(tokens: Tensor) -> str:
    """sha256 of a token tensor's bytes (int64, contiguous) and shape."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def local_path(data: str) -> Path | None:
    """The file or folder `data` names; None where it can only be a Hub data set. UserError for a missing file."""
    path = Path(data).expanduser()
    if path.exists():
        return path
    looks_local = path.suffix.lower() in (".txt", ".jsonl", ".ndjson", ".json", ".md", ".py", ".csv", ".parquet")
    if not looks_local and HUB_NAME.fullmatch(data):
        return None
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"calibration.data: no file {data!r}: there is no folder {str(folder)!r}")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3, cutoff=0.4)
    hint = f"; near by: {', '.join(sorted(near))}" if near else ""
    raise UserError(f"calibration.data: no file {data!r}{hint}")


def _encode(tokenizer: Any, texts: Any, special: bool) -> Any:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _stream_ids(path: Path, tokenizer: Any, need: int) -> list[int]:
    """At least `need` tokens of one text file, or all there are, exactly as tokenizing the whole file begins.

    The text is cut after a guess of characters, with TAIL tokens to spare as the cut can change the last ones; too few
    tokens double the guess. Tokenizers decide locally, so the rest of the file has no say in the tokens kept.
    """
    characters = GUESS * (need + TAIL)
    while True:
        text = _read_text(path, characters)
        ids = _encode(tokenizer, text, special=False)
        if len(text) < characters:
            return ids
        if len(ids) >= need + TAIL:
            return ids[:need]
        characters *= 2


def _read_text(path: Path, characters: int = -1) -> str:
    """The first characters of a UTF-8 file (a byte order mark is dropped), all with -1. UserError if empty."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {_bad_byte(path)} ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: there is no text in it")
    return text


def _bad_byte(path: Path) -> str:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            kept = len(decoder.getstate()[0])  # bytes of a character begun in the chunk before
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                offset = done - kept + error.start
                return f"byte {error.object[error.start]:#04x} at offset {offset}"
            done += len(chunk)
    return f"the last character is cut off at offset {done}"


def _text_documents(path: Path) -> Iterator[Document]:
    for part in _read_text(path).split(SEPARATOR):
        if part.strip():
            yield Document(part.strip("\n"))


def _documents(data: str, path: Path | None, tokenizer: Any) -> Iterator[Document]:
    """Documents of a .jsonl file, a `datasets` folder or a Hub data set, in order; blank ones are left out."""
    rows = _hub_rows(data) if path is None else _folder_rows(path) if path.is_dir() else _jsonl_rows(path)
    for place, row in rows:
        document = _document(place, row, tokenizer)
        if document.text.strip():
            yield document


def _document(place: str, row: Any, tokenizer: Any) -> Document:
    if not isinstance(row, dict):
        raise UserError(f'{place}: must be an object like {{"text": ...}} or {{"messages": [...]}}')
    if isinstance(row.get("text"), str):
        return Document(row["text"])
    if not isinstance(row.get("messages"), list):
        has = ", ".join(map(str, row)) or "no keys"
        raise UserError(f"{place}: has neither `text` (text) nor `messages` (a list), only: {has}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(f"{place}: `messages` need a chat template, and the model's tokenizer has none: give `text`")
    try:
        return Document(tokenizer.apply_chat_template(row["messages"], tokenize=False), templated=True)
    except Exception as error:  # the template is the model's own program: whatever it raises is about this row
        raise UserError(f"{place}: the chat template refuses these messages: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {_bad_byte(path)} ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("reading data sets needs the datasets package: pip install 'quantkit[data]'") from None
    return datasets


def _folder_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        files = ", ".join(sorted(f.name for f in path.iterdir() if f.suffix in (".txt", ".jsonl"))[:8])
        hint = f"; it holds {files}: name one of those" if files else ""
        raise UserError(f"{path}: this folder was not saved by datasets' save_to_disk{hint}")
    try:
        table = _datasets().load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: the data set cannot be read: {error}") from error
    if isinstance(table, dict):
        table = table["train"] if "train" in table else next(iter(table.values()))
    for number, row in enumerate(table):
        yield f"{path} row {number}", row


def _hub_rows(data: str) -> Iterator[tuple[str, Any]]:
    name, config, split = [*data.split(":"), "", ""][:3]
    datasets = _datasets()
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(table):
            yield f"{data} row {number}", row
    except Exception as error:  # network, names, configs, splits: each layer below has its own classes
        why = str(error).strip().splitlines() or [type(error).__name__]
        hint = f"no file of that name, and the Hub data set cannot be read: {why[0]}"
        raise UserError(f"calibration.data {data!r}: {hint} (a data set is NAME, NAME:CONFIG or ...:SPLIT)") from error


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
    hint = f"; {' or '.join(fits)} would fit" if fits else ""
    return f"{calibration.data}: {have} tokens, {samples} x {seq_len} = {samples * seq_len} are needed{hint}"
