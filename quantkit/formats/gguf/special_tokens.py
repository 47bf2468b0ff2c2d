"""Special tokens, what is put before and after a text, and chat templates."""

import json
from pathlib import Path
from typing import Any

from quantkit.checkpoint.gguf_writer import KeyValue
from quantkit.errors import UserError
from quantkit.formats.gguf.vocabulary import Vocabulary

KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}


def special_tokens(vocabulary: Vocabulary, vocab_size: int) -> dict[str, KeyValue]:
    """Ids of the special tokens and whether a text begins with bos and ends with eos: as the tokenizer does it.

    UserError where it puts more around a text than llama.cpp can: one token before it, one after it.
    """
    tokenizer = vocabulary.tokenizer
    before, after = _around(vocabulary)
    given = _configured_ids(vocabulary.folder)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    for name in ("bos", "eos"):
        if ids[name] is None and given.get(name):
            ids[name] = given[name][0]
    if before:
        ids["bos"] = before[0]
    if after:
        ids["eos"] = after[0]
    ids["eot"] = _end_of_turn(vocabulary, ids["eos"], given["eos"])
    found = {
        f"tokenizer.ggml.{key}_token_id": ("u32", ids[name])
        for name, key in KEYS.items()
        if ids[name] is not None and 0 <= ids[name] < vocab_size
    }
    return found | {
        "tokenizer.ggml.add_bos_token": ("bool", bool(before)),
        "tokenizer.ggml.add_eos_token": ("bool", bool(after)),
    }


def _around(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare = vocabulary.tokenizer.encode("a", add_special_tokens=False)
    whole = vocabulary.tokenizer.encode("a")
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            before, after = whole[:at], whole[at + len(bare) :]
            break
    else:
        before, after = whole, []
    if len(before) > 1 or len(after) > 1:
        names = [vocabulary.texts.get(i, str(i)) for i in before + after]
        raise UserError(
            f"{vocabulary.folder}: the tokenizer puts {' '.join(names)} around every text; llama.cpp has room for one"
            " token before a text and one after it\nhint: write those tokens into the chat template instead"
        )
    return before, after


def _configured_ids(folder: Path) -> dict[str, list[int]]:
    """The bos and eos ids of generation_config.json, then of config.json: eos may be several."""
    found: dict[str, list[int]] = {"bos": [], "eos": []}
    for name in ("generation_config.json", "config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for kind, ids in found.items():
            value = config.get(f"{kind}_token_id") if isinstance(config, dict) else None
            ids += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i not in ids]
    return found


def _end_of_turn(vocabulary: Vocabulary, eos: int | None, listed: list[int]) -> int | None:
    """The token that ends a turn: of those that end a generation, the one that the chat template writes.

    Where it writes several (Phi-3 lists <|assistant|> too), the first behind an answer. None without a template that
    writes one: llama.cpp then looks for the usual names itself.
    """
    templates = "".join(_templates(vocabulary).values())
    ends = [i for i in dict.fromkeys([eos, *listed]) if i is not None and vocabulary.texts.get(i)]
    written = [i for i in ends if vocabulary.texts[i] in templates]
    if len(written) < 2:
        return next(iter(written), None)
    behind = _behind_an_answer(vocabulary)
    found = {i: at for i in written if (at := behind.find(vocabulary.texts[i])) >= 0}
    return min(found or written, key=lambda i: found.get(i, 0))


def _behind_an_answer(vocabulary: Vocabulary) -> str:
    """What the chat template writes behind the assistant's answer; nothing where it cannot be tried."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        return str(vocabulary.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("ANSWER")[2]
    except Exception:  # a template is a program of its own, and may want other messages
        return ""


def _templates(vocabulary: Vocabulary) -> dict[str, str]:
    template: Any = vocabulary.tokenizer.chat_template
    return template if isinstance(template, dict) else {"default": template} if template else {}


def chat_templates(vocabulary: Vocabulary) -> dict[str, KeyValue]:
    """The chat template, and those with names of their own beside it."""
    templates = _templates(vocabulary)
    found: dict[str, KeyValue] = {}
    if "default" in templates:
        found["tokenizer.chat_template"] = ("string", templates["default"])
    named = sorted(name for name in templates if name != "default")
    if named:
        found["tokenizer.chat_templates"] = ("string[]", named)
    return found | {f"tokenizer.chat_template.{name}": ("string", templates[name]) for name in named}
