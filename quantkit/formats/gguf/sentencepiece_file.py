"""The tokenizer.model of sentencepiece, read without its library: pieces, scores, kinds, and the settings that count.

The file is one protobuf message (sentencepiece_model.proto): field 1 a piece (1 text, 2 score, 3 kind), 2 the trainer's
settings (3 model type, 40 to 43 the ids of unk, bos, eos, pad), 3 the normalizer's (2 character map, 3 dummy
prefix, 4 whitespace).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UserError

MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types are the same numbers


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says. `pieces`: text, score and kind (1 normal, 2 unknown, 3 control, ...) of each id."""

    model_type: str
    pieces: list[tuple[str, float, int]]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    character_map: bytes  # how characters are replaced first (NFKC); empty where they are not
    special_ids: dict[str, int]  # "unk", "bos", "eos", "pad" -> id, -1 where there is none


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The sentencepiece model in `path`; UserError where the file is none."""
    try:
        return _read(path.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a sentencepiece model ({error})\n"
            "hint: download the file again, or put a tokenizer.json beside it"
        ) from error


def _read(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    character_map = b""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score, kind = piece[1], piece.get(2, b"\0\0\0\0"), piece.get(3, NORMAL)
            if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                raise ValueError("a piece is malformed")
            pieces.append((text.decode("utf-8"), struct.unpack("<f", score)[0], kind))
        elif number in (2, 3) and isinstance(value, bytes):
            settings = trainer if number == 2 else normalizer
            fields = list(_fields(value))
            settings.update((field, entry) for field, entry in fields if isinstance(entry, int))
            if number == 3:
                character_map = next((entry for field, entry in fields if field == 2 and isinstance(entry, bytes)), b"")
    if not pieces:
        raise ValueError("it has no pieces")
    ids = {name: _signed(trainer.get(40 + i, default)) for i, (name, default) in enumerate(DEFAULT_IDS.items())}
    return SentencePieceModel(
        MODEL_TYPES.get(trainer.get(3, 1), "unknown"),
        pieces,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        character_map=character_map,
        special_ids=ids,
    )


DEFAULT_IDS = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}


def _signed(value: int) -> int:
    """A varint as the int32 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each field of a protobuf message; fixed numbers as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            length, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire] if wire in (1, 5) else -1, at)
            if length < 0 or at + length > len(data):
                raise ValueError(f"byte {at}: a field is cut off or of an unknown kind")
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"byte {at}: a number of more than 64 bits")
