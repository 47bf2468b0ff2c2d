"""The model of lm-eval: what lm-eval's own `hf` model gives, with one forward for the choices of a question."""

import json
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.errors import UserError
from tests.tiny_models import tiny_model

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model, model_registry
from quantkit_eval.lm_eval_model import QuantkitLM
from quantkit_eval.prefix_rows import Continuation
from quantkit_eval.task_engines import PlainEngine

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
ROWS = [json.loads(line) for line in (ROOT / "eval" / "tasks" / "qk_choice.jsonl").read_text().splitlines()][:12]
TEXT = (MODEL / "eval.txt").read_text(encoding="utf-8")
CPU = torch.device("cpu")
GREETING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


CHOICES = [instance("loglikelihood", row["context"], choice) for row in ROWS for choice in row["choices"]]
CHOICES += [instance("loglikelihood", "", "def main():"), instance("loglikelihood", "import os \n ", "import sys")]
CHOICES += [instance("loglikelihood", "class Cursor:\n    def size(self):\n        return", " self")]
CHOICES += [instance("loglikelihood", TEXT[:3300], " None of these")]  # cut at its start
ROLLING = [instance("loglikelihood_rolling", TEXT[:length]) for length in (40, 4000)]
PROMPTS = [
    instance("generate_until", prompt, {"until": stop, "max_gen_toks": 12})
    for prompt, stop in (("def main(", ["\n"]), ("import", "\n"), ("class A:\n    def __init__(self", [")", "x"]))
]


@pytest.fixture(scope="module")
def ours() -> QuantkitLM:
    return QuantkitLM(str(MODEL), device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def hf() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(MODEL), device="cpu", dtype="float32", batch_size=4)


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-4) and x == y for (a, x), (b, y) in zip(found, expected, strict=True))


def test_log_likelihoods_are_those_of_hf(ours: QuantkitLM, hf: Any) -> None:
    expected = hf.loglikelihood(CHOICES, disable_tqdm=True)
    assert close(ours.loglikelihood(CHOICES, disable_tqdm=True), expected)
    assert {right for _, right in expected} == {True, False}
    paged = QuantkitLM(str(MODEL), device="cpu", batch_size=8, engine="paged", max_length=1024)
    assert close(paged.loglikelihood(CHOICES[:8], disable_tqdm=True), expected[:8])
    written = ours.generate_until(PROMPTS, disable_tqdm=True)
    assert written == hf.generate_until(PROMPTS, disable_tqdm=True)
    assert written == paged.generate_until(PROMPTS, disable_tqdm=True)
    assert not any("\n" in text for text in written[:2])


def test_rolling_windows_are_those_of_hf(ours: QuantkitLM, hf: Any) -> None:
    found = ours.loglikelihood_rolling(ROLLING, disable_tqdm=True)
    assert found == pytest.approx(hf.loglikelihood_rolling(ROLLING, disable_tqdm=True), rel=1e-6, abs=1e-4)


def test_choices_of_a_question_are_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = QuantkitLM(str(MODEL), device="cpu")  # batch size 1
    read: list[int] = []
    hook = lm.engine.model.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    lm.loglikelihood(CHOICES[:8], disable_tqdm=True)
    hook.remove()
    assert len(read) == 2
    context = max(len(lm.tok_encode(row["context"])) for row in ROWS[:2])
    assert max(read) < 2 * context + 4 * 24  # twice the context would be two of its choices apart


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "falcon", "qwen3_moe", "gemma2", "cohere"])
def test_a_row_gives_what_its_lists_give_apart(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    if name == "gemma2":  # sliding layers: lists up to their width share rows
        model.config.sliding_window = 24
        model = type(model)(model.config).eval()
    model.save_pretrained(tmp_path)
    engine = PlainEngine(tmp_path, CPU, None, None, 3, False)
    requests = [
        Continuation([*range(3, 3 + context), *((7 * i + 5 * end) % 90 for i in range(end))], end)
        for context in (4, 9, 21)
        for end in (1, 3, 8)
    ]
    together = dict(engine.score(requests))
    apart = dict(engine.score(requests, apart=True))
    assert close([together[i] for i in range(9)], [apart[i] for i in range(9)])
    if name in ("llama", "gpt2", "gpt_neox", "qwen3_moe"):
        assert engine.longest is None  # and none of these was only right because it was not tried
    assert name != "gemma2" or engine.longest == 24


def test_quantized_folders_and_caches(tmp_path: Path, ours: QuantkitLM) -> None:
    quantkit.quantize(MODEL, {"weights": {"bits": 4, "group_size": 32, "algorithm": "rtn"}}, output=tmp_path / "w4")
    expected = ours.loglikelihood(CHOICES[:8], disable_tqdm=True)
    packed = QuantkitLM(str(tmp_path / "w4"), device="cpu", batch_size="auto")
    found = packed.loglikelihood(CHOICES[:8], disable_tqdm=True)
    assert not close(found, expected)
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], rel=0.3)
    rounded = QuantkitLM(str(MODEL), device="cpu", kv_cache="keys=int8;values=int4", batch_size="auto:2")
    again = rounded.loglikelihood(CHOICES[:8], disable_tqdm=True)
    assert [a for a, _ in again] == pytest.approx([a for a, _ in expected], rel=0.1)
    assert not close(again, expected)
    assert len(rounded.generate_until(PROMPTS[:1], disable_tqdm=True)) == 1


def test_chat_templates_and_names(ours: QuantkitLM) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    with pytest.raises(UserError, match="no chat template"):
        ours.apply_chat_template(messages)
    ours.tokenizer.chat_template = GREETING
    try:
        assert ours.apply_chat_template(messages) == "<system>be brief<user>hello<bot>"
        assert ours.apply_chat_template(messages, add_generation_prompt=False) == "<system>be brief<user>hello"
        assert ours.chat_template(True) == GREETING
        ours.tokenizer.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}hi"
        assert ours.apply_chat_template(messages) == "hi"
    finally:
        ours.tokenizer.chat_template = None
    assert "/" not in ours.tokenizer_name
    assert ours.tokenizer_name.endswith("tiny-llama")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "no model"),
        ({"pretrained": "no/such/folder/at/all"}, "no/such/folder/at/all"),
        ({"engine": "pagde"}, "did you mean `paged`"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"kv_cache": "int9"}, "int9"),
        ({"device": "gpu7"}, "gpu7"),
        ({"max_length": 1}, "max_length is 1"),
        ({"batchsize": 3}, "did you mean `batch_size`"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        QuantkitLM(**({"pretrained": str(MODEL)} if arguments and "pretrained" not in arguments else {}) | arguments)


def test_the_entry_point_is_the_model_by_the_rule_of_later_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They register what importlib.metadata finds in the group `lm_eval.models`, unless the name is taken, unloaded."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    information = tmp_path / "quantkit_declared-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: quantkit-declared\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (information / "entry_points.txt").write_text("\n".join(["[lm_eval.models]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[Any] = Registry("model")
    for point in entry_points(group="lm_eval.models"):
        if point.name not in registry:
            registry.register(point.name, target=point)
    assert registry.get("quantkit") is QuantkitLM


def test_importing_the_module_registers_the_model_once() -> None:
    """`lm_eval run --plugins quantkit_eval.lm_eval_model`, and `quantkit lm-eval` where a version has found it."""
    from quantkit_eval.tasks.command import register

    register()
    assert get_model("quantkit") is QuantkitLM
    assert "hf" in model_registry
