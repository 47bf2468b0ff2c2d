"""Tiny tokenizers made on the spot: byte-level BPE with any pre-tokenizer, sentencepiece's BPE, and their folders."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    "The quick brown fox doesn't jump; it's 12345 lazy dogs, isn't it?\n"
    "WE'LL SEE 42 camelCaseWords and snake_case_words.\n"
    "    def function(value):\n        return value + 1000\n\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f"
    " \ud55c\uad6d\uc5b4 \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0939\u093f\u0928\u094d\u0926\u0940"
    " caf\u00e9 na\u00efve \U0001f680\U0001f680!!\r\n"
    "\r\n\t\ttabs   and   spaces\n\n\n\u0645\u0631\u062d\u0628\u0627 ... --- ???\n"
)
SPACE = "\u2581"


def splits(regexes: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts by each regex in turn, then byte-level."""
    cuts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(
    pre: pre_tokenizers.PreTokenizer | None = None,
    *,
    normalizer: normalizers.Normalizer | None = None,
    ignore_merges: bool = False,
    unbuilt: Sequence[str] = (),
    special: Sequence[str] = ("<|end|>",),
    size: int = 400,
) -> Tokenizer:
    """A byte-level BPE tokenizer trained on a few lines; GPT-2's way of cutting unless `pre` is given.

    `unbuilt`: tokens of the vocabulary, in GPT-2's alphabet, that no merge makes.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [TEXT] * 2, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(unbuilt)}
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    made.pre_tokenizer = trained.pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


PIECES = [SPACE, *"thequickbrownfxjmpsvlazydg", "\n"]
JOINED = [
    "th",
    "the",
    f"{SPACE}t",
    f"{SPACE}the",
    "in",
    "ing",
    "er",
    f"{SPACE}a",
    "an",
    "and",
    f"{SPACE}and",
    SPACE * 2,
]


def piece_list() -> list[tuple[str, float, int]]:
    """Text, score and kind of the pieces of a tiny sentencepiece model with byte fallback."""
    characters = dict.fromkeys(PIECES)
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(JOINED)]
    return pieces + [(text, -float(len(JOINED) + i), 1) for i, text in enumerate(characters)]


def sentencepiece_bytes(
    pieces: Sequence[tuple[str, float, int]], *, model_type: int = 2, dummy_prefix: bool = True, one_space: bool = False
) -> bytes:
    """A tokenizer.model: its protobuf message."""

    def varint(value: int) -> bytes:
        out = b""
        while True:
            out += bytes([value & 0x7F | (0x80 if value > 0x7F else 0)])
            value >>= 7
            if not value:
                return out

    def field(number: int, data: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(data)) + data

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)

    trainer = b"\x18" + varint(model_type) + b"\xd8\x02" + varint((1 << 64) - 1)  # field 43, no pad: -1
    normalizer = b"\x18" + varint(int(dummy_prefix)) + b"\x20" + varint(int(one_space))
    return b"".join(field(1, piece(*entry)) for entry in pieces) + field(2, trainer) + field(3, normalizer)


def sentencepiece_bpe(*, prefix: bool = True, merges: Sequence[tuple[str, str]] | None = None) -> Tokenizer:
    """The tokenizer that transformers makes of the tiny sentencepiece model."""
    texts = [text for text, _, _ in piece_list()]
    if merges is None:
        known = set(texts)
        pairs = [(t[:i], t[i:]) for t in JOINED for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
        merges = pairs
    vocab = {text: i for i, text in enumerate(texts)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ("<unk>", "<s>", "</s>")
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")
PHI3_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi3_folder(folder: Path, *, swallowing: bool = True) -> Path:
    """A tiny tokenizer with the added tokens of Phi-3: spaces behind all but three are dropped, if `swallowing`."""
    made = sentencepiece_bpe()
    made.add_tokens([AddedToken("</s>", special=False, rstrip=swallowing, normalized=False)])
    strips = {token: swallowing and token != "<|endoftext|>" for token in PHI3_TOKENS}
    made.add_special_tokens([AddedToken(t, special=True, rstrip=strips[t], normalized=False) for t in PHI3_TOKENS])
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    tokenizer_folder(folder, made, settings | {"chat_template": PHI3_TEMPLATE})
    ids = [made.token_to_id(token) for token in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": ids}))
    return folder


def tokenizer_folder(folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json, as transformers saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
