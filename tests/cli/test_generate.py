"""quantkit generate: what is on stdout and what on stderr, prompts from everywhere, chats, interrupts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.runtime.engine.llm import LLM

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def run(*arguments: str, stdin: str = "") -> Any:
    return CliRunner().invoke(app, ["generate", *arguments], input=stdin)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """What is generated behind `def `, as JSON."""
    return json.loads(run(str(MODEL), "--prompt", "def ", "--max-tokens", "12", "--json").stdout)


def test_the_text_is_alone_on_stdout(plain: dict[str, Any], tmp_path: Path) -> None:
    """From --prompt, --file and stdin: the same."""
    (tmp_path / "p.txt").write_text("def \n")
    for arguments, stdin in ((["--prompt", "def "], ""), (["--file", str(tmp_path / "p.txt")], ""), ([], "def ")):
        result = run(str(MODEL), *arguments, "--max-tokens", "12", stdin=stdin)
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip("\n") == plain["text"].rstrip("\n")
        assert result.stderr.startswith("12 tokens in ")
        assert result.stderr.count("\n") == 1
        assert "tokens/s" in result.stderr


def test_json_has_all_of_it(plain: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode([*tokenizer("def ")["input_ids"], *plain["token_ids"]]) == "def " + plain["text"]
    assert (plain["prompt"], plain["finish_reason"], len(plain["token_ids"])) == ("def ", "length", 12)
    assert 0 < plain["first_seconds"] <= plain["seconds"]
    assert plain["tokens_per_second"] == pytest.approx(11 / (plain["seconds"] - plain["first_seconds"]))
    assert (plain["drafted"], plain["acceptance"]) == (0, None)


@pytest.mark.parametrize("how", [("--speculate", "ngram"), ("--draft", str(MODEL))], ids=["ngram", "draft"])
def test_guesses_change_nothing_and_are_counted(plain: dict[str, Any], how: tuple[str, str]) -> None:
    result = run(str(MODEL), "--prompt", "def ", "--max-tokens", "12", "--json", *how)
    found = json.loads(result.stdout)
    assert found["token_ids"] == plain["token_ids"]
    if how[0] == "--draft":  # the model itself, which is always right
        assert found["drafted"] > 0
        assert found["acceptance"] == 1
        assert "100% of" in result.stderr


def test_the_cache_can_be_quantized(plain: dict[str, Any]) -> None:
    """In 4 bits it writes something else after a while; a wrong name is refused."""
    arguments = [str(MODEL), "--prompt", "def f(x):\n    return", "--max-tokens", "40", "--quiet"]
    texts = [run(*arguments, *more).stdout for more in ([], ["--kv-cache", "int4"], ["--kv", "keys=int8,values=int8"])]
    assert texts[0] == texts[2]
    assert texts[1] != texts[0]
    wrong = run(*arguments, "--kv-cache", "int9")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "'int9'" in wrong.stderr


def test_seeds(plain: dict[str, Any]) -> None:
    def text(seed: int) -> str:
        arguments = ["--prompt", "def ", "--max-tokens", "12", "--temperature", "1", "--seed", str(seed)]
        return run(str(MODEL), *arguments).stdout

    assert text(1) == text(1) != text(2)


def test_a_stop_string_is_never_shown_in_part(plain: dict[str, Any]) -> None:
    tokenizer, ids = AutoTokenizer.from_pretrained(MODEL), plain["token_ids"]
    stop = tokenizer.decode(ids[:4])[-1] + tokenizer.decode(ids[:5])[len(tokenizer.decode(ids[:4])) :]  # two tokens
    assert plain["text"].index(stop) > 0
    result = run(str(MODEL), "--prompt", "def ", "--stop", stop, "--max-tokens", "12")
    assert result.stdout.rstrip("\n") == plain["text"][: plain["text"].index(stop)].rstrip("\n")


def test_chats(chatty: Path) -> None:
    """Each answer is what the whole chat so far asks for; with a prompt there is one answer."""
    result = run(str(chatty), "--chat", "--max-tokens", "6", stdin="hello\n\nfoo\n")
    assert result.exit_code == 0, result.output
    llm = LLM(MODEL, max_num_seqs=1)
    from quantkit.runtime.engine.request import SamplingParams

    params, history, answers = SamplingParams(temperature=0, max_tokens=6), "", []
    for message in ("hello", "foo"):
        history += f"<user>{message}\n<assistant>"
        answers.append(llm.generate(history, params)[0].outputs[0].text)
        history += f"{answers[-1]}\n"
    assert result.stdout == "".join(text if text.endswith("\n") else f"{text}\n" for text in answers)
    assert result.stderr.count("tokens/s") == 2
    one = run(str(chatty), "--chat", "--prompt", "hello", "--max-tokens", "6", "--json")
    assert json.loads(one.stdout)["text"] == answers[0]


def test_interrupts_free_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made, step = [], LLM.step

    def steps(self: LLM) -> Any:
        made.append(self)
        if len(made) == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LLM, "step", steps)
    result = run(str(MODEL), "--prompt", "def ", "--max-tokens", "50")
    assert result.exit_code == 130
    assert "3 tokens" in result.stderr
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.output
    llm = made[0]
    assert (llm.unfinished, llm.scheduler.blocks.free) == (0, llm.scheduler.blocks.blocks)


def test_a_prompt_that_does_not_fit(tmp_path: Path) -> None:
    result = run(str(MODEL), "--prompt", "def " * 40, "--context", "8")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the model's context has 8" in result.stderr


def test_models_the_engine_does_not_run_are_refused_by_their_configuration(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "m")
    settings = json.loads((MODEL / "config.json").read_text())
    mamba = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": settings["vocab_size"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(mamba))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")  # never read
    result = run(str(tmp_path / "m"), "--prompt", "x")
    assert result.exit_code == 2
    assert "MambaForCausalLM is" in result.stderr
