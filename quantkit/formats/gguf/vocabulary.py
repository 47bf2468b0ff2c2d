"""A folder's tokenizer as GGUF needs it: the tokenizer that splits and merges, its vocabulary, its added tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import AddedToken as TransformersAddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.errors import UserError
from quantkit.formats.gguf.pre import is_byte_level, merge_pairs
from quantkit.formats.gguf.sentencepiece_file import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)
from quantkit.formats.gguf.spm_scores import pairs_of_pieces

Added = AddedToken | TransformersAddedToken
SPACE = "\u2581"  # what sentencepiece writes for a space
BPE_ONLY = "GGUF is written for byte-level BPE and for sentencepiece's BPE (Llama-2, Mistral, Gemma)"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a folder.

    `own`: as it was put together of the folder's files, None where there is a tokenizer.json. `backend`: the one of
    tokenizer.json, which cuts and merges as the model was trained to. `model`: the BPE section of tokenizer.json.
    `piece_scores`: score of each piece in tokenizer.model, where the folder has one that holds the same pieces.
    """

    folder: Path
    own: PreTrainedTokenizerFast | None
    backend: Tokenizer
    model: Mapping[str, Any]
    piece_scores: Mapping[str, float] | None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As transformers loads it, for special tokens, templates and what it adds to a text.

        That takes seconds for a large vocabulary, so only what needs it asks. UserError where it does not load.
        """
        return locate_tokenizer(self.folder, trust_remote_code=False) if self.own is None else self.own

    @cached_property
    def unknown(self) -> str | None:
        """The token for what the vocabulary lacks."""
        return self.tokenizer.unk_token  # type: ignore[return-value]

    @cached_property
    def byte_level(self) -> bool:
        return is_byte_level(self.backend)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are joined, the first first."""
        return merge_pairs(self.model)

    @cached_property
    def added(self) -> Mapping[int, Added]:
        """The added tokens by id: of tokenizer.json and of tokenizer_config.json."""
        return {**self.backend.get_added_tokens_decoder(), **self.tokenizer.added_tokens_decoder}

    @cached_property
    def texts(self) -> dict[int, str]:
        """The text of each id, in the tokenizer's own spelling (bytes or spaces replaced)."""
        return {i: text for text, i in self.model["vocab"].items()} | {
            i: token.content for i, token in self.added.items()
        }

    def form(self, text: str) -> str:
        """`text` as the merges see it, its pieces together."""
        return "".join(self._pieces(text))

    def merged(self, text: str) -> list[int]:
        """The ids that the merges make of `text`; added tokens play no part."""
        return [token.id for piece in self._pieces(text) for token in self.backend.model.tokenize(piece)]

    def _pieces(self, text: str) -> list[str]:
        normalized = text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)
        if self.backend.pre_tokenizer is None:
            return [normalized] if normalized else []
        return [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(normalized)]


def token_count(folder: Path) -> int:
    """How many ids the tokenizer of `folder` has, added ones and holes included: embedding rows beyond it are padding.

    Gemma 3's files hold no such rows: llama.cpp's converter drops them. UserError where the tokenizer does not load.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return max(_tokenizer(folder)[1].get_vocab().values()) + 1
    whole = _json(path)
    added = [token["id"] for token in whole.get("added_tokens") or []]
    return max([*_bpe_section(whole, folder)["vocab"].values(), *added], default=-1) + 1


def load_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer of `folder`; UserError where there is none, where it does not load, and where it is no BPE."""
    own, backend = _tokenizer(folder)
    path = folder / "tokenizer.json"
    model = _bpe_section(_json(path) if path.is_file() else json.loads(backend.to_str()), folder)
    spm_file = folder / "tokenizer.model"
    scores = _matching_scores(spm_file, model) if spm_file.is_file() else None
    return Vocabulary(folder, own, backend, model, scores)


def _tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast | None, Tokenizer]:
    """Vocabulary.own, and the one that cuts and merges: tokenizer.json's if it exists.

    transformers 5 rebuilds some by the name of their class, Llama-2's with another way to put a space in front.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises Exception itself
            raise UserError(
                f"{path}: does not load ({error})\nhint: copy the file of the original model again"
            ) from error
        return None, backend
    if (folder / "tokenizer.model").is_file() and not (folder / "vocab.json").is_file():
        tokenizer = _from_sentencepiece(folder, _bpe_pieces(folder / "tokenizer.model"))
    else:
        tokenizer = locate_tokenizer(folder, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is a tokenizer of Python code\nhint: {BPE_ONLY}, from tokenizer.json"
        )
    return tokenizer, tokenizer.backend_tokenizer


def _bpe_section(whole: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The model of a tokenizer.json; UserError where it is not BPE or marks pieces' ends in a way llama.cpp lacks."""
    model = whole.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{folder / 'tokenizer.json'}: no model in it\nhint: copy the file of the original model again")
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise UserError(f"{folder}: a tokenizer of the kind {kind} is not supported\nhint: {BPE_ONLY}")
    if not isinstance(model.get("vocab"), dict):
        raise UserError(f"{folder / 'tokenizer.json'}: no vocabulary\nhint: copy the file of the original model again")
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(mark):
            what = f"the tokenizer's {mark} {model[mark]!r} is unknown to llama.cpp"
            raise UserError(f"{folder}: {what}\nhint: {BPE_ONLY}")
    return model


def _bpe_pieces(path: Path) -> SentencePieceModel:
    spm = read_sentencepiece(path)
    if spm.model_type != "BPE":
        raise UserError(
            f"{path}: a sentencepiece model of the kind {spm.model_type} is not supported\nhint: {BPE_ONLY}"
        )
    return spm


def _matching_scores(path: Path, model: Mapping[str, Any]) -> dict[str, float] | None:
    """The scores of tokenizer.model; None where it is not the one from which tokenizer.json's vocabulary was made."""
    spm = read_sentencepiece(path)
    scores = {text: score for text, score, kind in spm.pieces if kind == NORMAL}
    same = spm.model_type == "BPE" and all(model["vocab"].get(text) == i for i, (text, _, _) in enumerate(spm.pieces))
    return scores if same else None


def _from_sentencepiece(folder: Path, spm: SentencePieceModel) -> PreTrainedTokenizerFast:
    """The tokenizer that a tokenizer.model and the JSON beside it describe, as transformers' conversion makes it."""
    config = _json(folder / "tokenizer_config.json")
    names = {kind: spm.pieces[i][0] for kind, i in spm.special_ids.items() if 0 <= i < len(spm.pieces)}
    special = {
        f"{kind}_token": _content(config.get(f"{kind}_token")) or names.get(kind) for kind in names | {"pad": ""}
    }
    scores = {text: score for text, score, kind in spm.pieces if kind in (NORMAL, USER_DEFINED)}
    backend = Tokenizer(
        models.BPE(
            vocab={text: i for i, (text, _, _) in enumerate(spm.pieces)},
            merges=pairs_of_pieces(scores),
            unk_token=names.get("unk"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if spm.character_map:
        steps.append(normalizers.Precompiled(spm.character_map))
    if spm.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spm.add_dummy_prefix and config.get("add_prefix_space", True):
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_tokens(backend, spm, folder, config)
    bos = special.get("bos_token")
    if bos and config.get("add_bos_token", True):
        pairs = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pairs)
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=chat, **{k: v for k, v in special.items() if v}
    )


def _add_tokens(backend: Tokenizer, spm: SentencePieceModel, folder: Path, config: Mapping[str, Any]) -> None:
    """The pieces that sentencepiece matches whole, then the tokens that the JSON beside it adds, by id."""
    added = [AddedToken(t, special=k != USER_DEFINED, normalized=False) for t, _, k in spm.pieces if k in WHOLE]
    later = {i: AddedToken(text, normalized=False) for text, i in _json(folder / "added_tokens.json").items()}
    for i, token in config.get("added_tokens_decoder", {}).items():
        later[int(i)] = AddedToken(token["content"], special=token.get("special", False), normalized=False)
    backend.add_tokens(added + [later[i] for i in sorted(later)])


WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)


def _content(token: Any) -> str | None:
    """The text of a token of tokenizer_config.json: written as it is, or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})\nhint: copy the file of the original model again") from error
    return found if isinstance(found, dict) else {}
