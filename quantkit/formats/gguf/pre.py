"""The `tokenizer.ggml.pre` of a byte-level BPE tokenizer, from where it cuts texts, never from its name or a hash.

Each of llama.cpp's pre-tokenizers and the tokenizer itself cut the 300 strings of the probe. Merges play no part: added
tokens, the chat template and the vocabulary do not change the answer.
"""

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from quantkit.errors import UserError
from quantkit.formats.gguf.pre_probe import PROBE
from quantkit.formats.gguf.pre_table import PRE_NAMES, PRE_TOKENIZERS, PreTokenizer
from quantkit.suggestions import nearest

Cuts = list[list[str]]  # the pieces of each string of the probe

PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# GPT-2's alphabet: a character for each byte, the printable ones themselves and the rest from U+0100 on
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in PRINTABLE)
}


def byte_level_pieces(backend: Tokenizer, text: str) -> list[str] | None:
    """The pieces into which the tokenizer cuts `text` before any merge; None where they are not byte-level."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return None
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    try:
        return [_text(piece) for piece in pieces]
    except KeyError:
        return None


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether merges work on GPT-2's alphabet of bytes."""
    return byte_level_pieces(backend, "a \u00e9\n\u4f60") is not None


def cut(regexes: tuple[str, ...], text: str) -> list[str]:
    """The pieces of `text`: each regex cuts the pieces of the one before into matches and what lies between them."""
    return [piece for piece, _ in _splitter(regexes).pre_tokenize_str(text)]


@cache
def _splitter(regexes: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes])


@cache
def _cuts(regexes: tuple[str, ...]) -> Cuts:
    return [cut(regexes, text) for text in PROBE]


def check_name(name: str) -> str:
    """`name` where llama.cpp has such a pre-tokenizer; UserError with the nearest one where not."""
    if name in PRE_NAMES:
        return name
    near = nearest(name, PRE_NAMES)
    hint = f"did you mean `{near}`?" if near else f"llama.cpp has {', '.join(PRE_NAMES)}"
    raise UserError(f"--pre {name}: llama.cpp has no pre-tokenizer of that name\nhint: {hint}")


def find_pre(backend: Tokenizer, model: Mapping[str, Any], added: Collection[str], where: Path) -> str:
    """The name of llama.cpp's pre-tokenizer that cuts all strings of the probe as this byte-level BPE does.

    `model` is the `model` section of its tokenizer.json, `added` the texts of its added tokens. Among equals the first
    of the table wins, so a fine-tune gets the name of its ancestor. UserError, listing the nearest, where none agrees.
    """
    own = [byte_level_pieces(backend, text) or [] for text in PROBE]
    _check_normalizer(own, where)
    differing = {pre: _differing(pre, own) for pre in PRE_TOKENIZERS}
    agreeing = [pre for pre in PRE_TOKENIZERS if not differing[pre]]
    if not agreeing:
        raise _none_agrees(differing, own, where)
    ignore_merges = bool(model.get("ignore_merges"))
    if agreeing[0].ignore_merges != ignore_merges:
        unbuilt = _unbuilt_tokens(model, added, agreeing[0].regexes)
        alike = [pre for pre in agreeing if pre.ignore_merges == ignore_merges or not unbuilt]
        if not alike:
            raise _merges_differ(agreeing[0], ignore_merges, unbuilt, where)
        agreeing = alike
    return agreeing[0].names[0]


def _check_normalizer(own: Cuts, where: Path) -> None:
    """UserError where the tokenizer changes texts before it cuts them, beyond NFC: llama.cpp changes none."""
    for text, pieces in zip(PROBE, own, strict=True):
        joined = "".join(pieces)
        if joined not in (text, normalize("NFC", text)):
            raise UserError(
                f"{where}: the tokenizer changes texts before it cuts them ({text!r} becomes {joined!r}), llama.cpp"
                " does not\nhint: --pre NAME writes the name of a pre-tokenizer of llama.cpp all the same"
            )


def _differing(pre: PreTokenizer, own: Cuts) -> list[int]:
    """Which strings of the probe are cut otherwise; by the model's regexes or by llama.cpp's, whichever is nearer."""
    ways = [regexes for regexes in (pre.regexes, pre.engine) if regexes]
    return min(([i for i in range(len(PROBE)) if _expected(way, i, own) != own[i]] for way in ways), key=len)


def _expected(regexes: tuple[str, ...], i: int, own: Cuts) -> list[str]:
    """How the regexes cut string `i` of the probe, as the tokenizer normalizes it."""
    joined = "".join(own[i])
    return _cuts(regexes)[i] if joined == PROBE[i] else cut(regexes, joined)


def _unbuilt_tokens(model: Mapping[str, Any], added: Collection[str], regexes: tuple[str, ...]) -> list[str]:
    """Tokens that merges do not build from their own text: only for them it matters that pieces are looked up."""
    merging = models.BPE(vocab=model["vocab"], merges=merge_pairs(model))
    tokens = [token for token in model["vocab"] if token not in added and all(char in BYTE_OF for char in token)]
    unbuilt = [token for token in tokens if len(merging.tokenize(token)) != 1]
    return [token for token in unbuilt if len(cut(regexes, _text(token))) == 1]


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, in order: each two texts in a list, or in older files one text with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _text(token: str) -> str:
    """The text whose bytes a byte-level token spells; U+FFFD for bytes that are no UTF-8."""
    return bytes(BYTE_OF[char] for char in token).decode("utf-8", "replace")


def _none_agrees(differing: Mapping[PreTokenizer, list[int]], own: Cuts, where: Path) -> UserError:
    ranking = sorted(PRE_TOKENIZERS, key=lambda pre: len(differing[pre]))[:3]
    lines = []
    for pre in ranking:
        first = differing[pre][0]
        theirs = _expected(pre.regexes, first, own)
        lines.append(
            f"  {pre.names[0]}: {len(differing[pre])} of {len(PROBE)} strings differ, as {PROBE[first]!r}:"
            f" {theirs} against {own[first]} here"
        )
    return UserError(
        f"{where}: the tokenizer cuts texts as no pre-tokenizer of llama.cpp does; the nearest are\n"
        + "\n".join(lines)
        + f"\nhint: --pre {ranking[0].names[0]} writes the nearest name all the same"
    )


def _merges_differ(pre: PreTokenizer, ignore_merges: bool, unbuilt: list[str], where: Path) -> UserError:
    does, engine = ("looks up", "builds") if ignore_merges else ("builds", "looks up")
    return UserError(
        f"{where}: the tokenizer cuts texts as `{pre.names[0]}` of llama.cpp does, but {does} pieces that are tokens"
        f" where llama.cpp {engine} them; {len(unbuilt)} tokens are not what their merges build, as {unbuilt[0]!r}\n"
        f"hint: --pre {pre.names[0]} writes that name all the same"
    )
