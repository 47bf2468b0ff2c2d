"""Writes the rows of the three tasks beside it: Python idioms with names filled in, the same rows at every run.

    python eval/tasks/make_tasks.py

A model of Python code can answer from what the context shows; a model of another language answers by chance. Left out
are rows whose answer hangs on rounding: where the bundled model's two best answers are less than CLEAR nats apart.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CLEAR = {"cloze": 0.25, "choice": 0.5}  # nats; bfloat16 logits of 8 to 16 are 1/16 apart
MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"

NAMES = (
    *("name", "value", "path", "index", "size", "count", "key", "data", "text", "width", "height", "result"),
    *(
        "config",
        "model",
        "token",
        "offset",
        "length",
        "parent",
        "source",
        "target",
        "batch",
        "label",
        "weight",
        "shape",
    ),
)
CLASSES = (
    "Point",
    "Node",
    "Reader",
    "Buffer",
    "Client",
    "Parser",
    "Layer",
    "Cursor",
    "Record",
    "Worker",
    "Filter",
    "Tree",
)
MODULES = ("os", "json", "re", "math", "time", "random", "torch", "copy", "sys", "logging", "pathlib", "warnings")

# What a name or a word in <> stands for is drawn for each row by itself; behind | is what must follow.
CLOZE = (
    "class <C>:\n    def __init__(self, <a>, <b>):\n        self.<a> = <a>\n        self.<b> =| <b>",
    "def copy_<a>(<a>, <b>):\n    if <a> is None:\n        return| None",
    "def find(<a>, <b>):\n    for <c> in <a>:\n        if <c> ==| <b>",
    "def total(<a>s):\n    result = 0\n    for <a> in <a>s:\n        result +=| <a>",
    "def pairs(<a>):\n    result = {}\n    for key, value in <a>.items():\n        result[key] =| value",
    "def load(<a>):\n    with open(<a>) as f:\n        <b> = f.read()\n    return| <b>",
    "def check(<a>):\n    if not isinstance(<a>, str):\n        raise| TypeError",
    "def swap(<a>, <b>):\n    <a>, <b> = <b>,| <a>",
    "class <C>:\n    def get_<a>(self):\n        return| self",
    "def convert(<a>):\n    try:\n        return int(<a>)\n    except| ValueError",
    "def choose(<a>, <b>):\n    if <a> > <b>:\n        return <a>\n    else:\n        return| <b>",
    "def last(<a>):\n    <b> = len(<a>)\n    for i in range(<b>):\n        if <a>[i] is| None",
)
# Behind | the line that follows, then lines that could not.
CHOICES = (
    "import <m>\n\n\ndef run_<a>(<a>):\n|    return <a>|    import return|    def <a>:|    class self",
    "class <C>:\n    def __init__(self, <a>):\n|        self.<a> = <a>|        self.<b> = self|        def <a> = self"
    "|        <a>.self = <C>",
    "def add_<a>(self, <a>):\n|    self.<a>s.append(<a>)|    <a>.self.append(self)|    self.append(<b>s)"
    "|    append = <a>(self).self",
    "for <a> in range(10):\n|    print(<a>)|    range(print)|    for in <a>|    print(<b>)",
    "with open(<a>) as f:\n|    <b> = f.read()|    <b> = <b>.open()|    f = with(<b>)|    read = f(<a>)",
    "def is_<a>(<b>):\n    if <b> is None:\n|        return False|        is <b>|        None = <b>|        return def",
    "try:\n    <a> = int(<b>)\n|except ValueError:|else ValueError:|import except:|except <b>():",
    "while <a> < len(<b>):\n|    <a> += 1|    <a> -= <b>|    <b> = while|    len += <a>",
    "def get(self, <a>, default=None):\n|    return self.<b>.get(<a>, default)|    return default.self(<a>)"
    "|    self = get(default)|    return None.get(<b>)",
    'if not isinstance(<a>, str):\n|    raise TypeError(f"<a> must be a string")|    raise KeyError(<b>)'
    "|    str = raise <a>|    isinstance(raise)",
)
CODE = (
    "class <C>:\n    def __init__(self, <a>, <b>):\n        self.<a> = <a>\n        self.<b> =| <b>",
    "class <C>:\n    def __init__(self, <a>, <b>, <c>):\n        self.<a> = <a>\n        self.<b> = <b>\n"
    "        self.<c> =| <c>",
    "class <C>:\n    def __init__(self, <a>=None):\n        self.<a> =| <a>",
    'def first(<a>):\n    if <a> is None:\n        raise ValueError("<a> is None")\n    return| <a>',
    "def total(<a>s):\n    result = 0\n    for <a> in <a>s:\n        result +=| <a>",
    "for <a> in range(len(<b>)):\n    print(<b>[|<a>])",
    "with open(<a>) as f:\n    <b> =| f.read()",
    "def swap(<a>, <b>):\n    return <b>,| <a>",
    "assert <a>.shape == (2, 3)\nassert <b>.shape ==| (2, 3)",
    "try:\n    import <m>\nexcept ImportError:\n    <m> =| None",
)


def filled(template: str, draw: random.Random) -> list[str]:
    """The parts of a template between its |, with names drawn for what stands in <>."""
    names = dict(zip(("<a>", "<b>", "<c>"), draw.sample(NAMES, 3), strict=True))
    names |= dict(zip(("<C>", "<D>"), draw.sample(CLASSES, 2), strict=True))
    names["<m>"] = draw.choice(MODULES)
    for mark, name in names.items():
        template = template.replace(mark, name)
    return template.split("|")


def rows(
    templates: tuple[str, ...], each: int, seed: int, clear: Callable[[list[str]], bool] = lambda row: True
) -> list[list[str]]:
    """At most `each` different rows of every template, in turn, of those that are clear."""
    draw = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    for template in templates:
        drawn = dict.fromkeys(tuple(filled(template, draw)) for _ in range(4 * each))
        found |= dict.fromkeys([row for row in drawn if clear(list(row))][:each])
    return draw.sample([list(row) for row in found], len(found))


@cache
def bundled_model() -> tuple[Any, Any]:
    """The bundled model in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


def logits(context: str, target: str) -> tuple[Any, Any]:
    """What the bundled model gives each word at the places of the target's tokens, and these tokens."""
    import torch

    model, tokenizer = bundled_model()
    first = len(tokenizer(context)["input_ids"])
    ids = torch.tensor(tokenizer(context + target)["input_ids"])
    with torch.inference_mode():
        return model(input_ids=ids[None]).logits[0, first - 1 : -1], ids[first:]


def clear_cloze(row: list[str]) -> bool:
    """Whether each token of the target is likelier, or less likely, than all others by some way."""
    values, ids = logits(*row)
    own = values.gather(1, ids[:, None])[:, 0]
    others = values.scatter(1, ids[:, None], float("-inf")).amax(1)
    return bool((own - others).abs().min() > CLEAR["cloze"])


def clear_choice(row: list[str]) -> bool:
    """Whether one of the lines is likelier than all others by some way."""
    context, *lines = row
    found = [(v.log_softmax(1).gather(1, ids[:, None]).sum().item()) for v, ids in (logits(context, x) for x in lines)]
    second, best = sorted(found)[-2:]
    return best - second > CLEAR["choice"]


def main() -> None:
    here = Path(__file__).parent
    cloze = [{"context": context, "target": target} for context, target in rows(CLOZE, 20, 1, clear_cloze)]
    choice = []
    draw = random.Random(2)
    for context, *lines in rows(CHOICES, 24, 3, clear_choice):
        order = draw.sample(range(len(lines)), len(lines))
        choice.append({"context": context, "choices": [lines[i] for i in order], "answer": order.index(0)})
    code = [{"context": context, "target": target} for context, target in rows(CODE, 12, 4)]
    for name, written in (("qk_cloze", cloze), ("qk_choice", choice), ("qk_code", code)):
        lines = (json.dumps(row, ensure_ascii=False) for row in written)
        (here / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
