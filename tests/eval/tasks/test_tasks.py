"""`quantkit eval --tasks` and `quantkit lm-eval`: what they print, and how they fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app

pytest.importorskip("lm_eval")

from quantkit_eval.tasks.run import evaluate_tasks
from quantkit_eval.tasks.task_files import own_tasks

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "tiny-llama"
OWN = {"qk_choice": 0.25, "qk_cloze": 0.0, "qk_code": 0.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at three bits, which costs it answers."""
    out = tmp_path_factory.mktemp("tasks") / "w3"
    quantkit.quantize(MODEL, {"weights": {"bits": 3, "group_size": 128, "algorithm": "rtn"}}, output=out)
    return out


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert len(lines) <= 2
    return "\n".join(lines)


def test_our_own_tasks_have_rows_enough_and_the_bundled_model_answers_above_chance() -> None:
    found = evaluate_tasks(MODEL, "quantkit", batch_size=16)
    assert {row.task for row in found.results} == set(OWN)
    for row in found.results:
        assert row.questions >= 100
        assert row.chance == pytest.approx(OWN[row.task])
        assert row.stderr is not None
        assert row.value > row.chance + 5 * row.stderr
        assert row.value < 0.97  # room to lose something


def test_a_model_beside_its_original(packed: Path) -> None:
    result = invoke("eval", packed, "--ref", MODEL, "--tasks", "qk_choice,qk_cloze", "--limit", 40, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["task"] for row in found["results"]] == ["qk_choice", "qk_cloze"]
    for row in found["results"]:
        comparison, paired = row["comparison"], row["comparison"]["paired"]
        assert row["questions"] == 40
        assert comparison["recovery"] == pytest.approx(row["value"] / comparison["value"])
        assert paired["difference"] == pytest.approx(row["value"] - comparison["value"])
        assert paired["difference"] == pytest.approx((paired["gained"] - paired["lost"]) / 40)
        assert comparison["verdict"] in ("recovered", "lost", "cannot tell")
    assert any(row["comparison"]["paired"]["lost"] for row in found["results"])


def test_the_table_says_all_of_it(packed: Path) -> None:
    result = invoke("eval", packed, "--ref", MODEL, "--tasks", "qk_choice", "--limit", 20, "--num-fewshot", 1, "-q")
    assert result.exit_code == 0, result.output
    for word in ("qk_choice", "recovery", "above chance", "difference", "lost", "won", "verdict", "1-shot", "N 20"):
        assert word in result.stdout
    assert "recovered: the paired difference" in result.stdout
    assert result.stderr == ""


def test_lm_evals_own_command_gives_what_hf_gives(capfd: pytest.CaptureFixture[str]) -> None:
    """The bundled model is stored in bfloat16, and `hf` computes in it: rows that hang on rounding are left out."""
    tables = []
    for model in ("quantkit", "hf"):
        arguments = ("--model", model, "--model_args", f"pretrained={MODEL}", "--device", "cpu", "--batch_size", 8)
        result = invoke(
            "lm-eval", *arguments, "--tasks", "qk_cloze", "--include_path", ROOT / "eval" / "tasks", "-L", 60
        )
        assert result.exit_code == 0, result.output
        tables.append([line for line in result.output.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1]
    assert any("acc" in line for line in tables[0])
    assert "usage: lm-eval" in invoke("lm-eval", "--help").output


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.yaml", "task: x\ndataset_path: [json\ntest_split: test\n", "bad.yaml:3: a task file must be YAML"),
        ("text.yaml", "this is a shopping list\n", "text.yaml:1: a task file must be a YAML mapping"),
        ("empty.yaml", "", "empty.yaml:1:"),
        ("bytes.yaml", "\x00\x01", "bytes.yaml:1:"),
        ("list.yaml", "# tasks\n- a\n- b\n", "list.yaml:2:"),
    ],
)
def test_a_task_file_that_is_not_yaml_is_one_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    assert words in refused("eval", MODEL, "--tasks", "x", "--include-path", tmp_path)
    assert words in refused("eval", MODEL, "--tasks", tmp_path / name)
    command = ("lm-eval", "--model", "quantkit", "--model_args", f"pretrained={MODEL}", "--tasks", "x")
    assert words in refused(*command, "--include_path", tmp_path)


def test_faulty_tasks_are_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "eval" / "tasks" / "qk_cloze.yaml", tmp_path / "mine.yaml")
    answer = refused("eval", MODEL, "--tasks", tmp_path / "mine.yaml")  # its rows were not copied
    assert "qk_cloze" in answer or "mine.yaml" in answer
    assert "cannot be loaded" in answer
    (tmp_path / "hub.yaml").write_text(
        "task: hub\ndataset_path: somebody/something\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{a}}'\ndoc_to_choice: '{{b}}'\ndoc_to_target: '{{c}}'\n"
    )
    answer = refused("eval", MODEL, "--tasks", "hub", "--include-path", tmp_path)
    assert "task 'hub' needs the Hugging Face Hub" in answer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tasks", ","), "no task"),
        (("--tasks", "qk_cloze", "--limit", "0"), "--limit is 0"),
        (("--tasks", "qk_cloze", "--num-fewshot", "-1"), "--num-fewshot is -1"),
        (("--tasks", "qk_cloze", "--text", "general"), "--text is of texts"),
        (("--tasks", "qk_cloze", "--context", "64"), "--context is of texts"),
        (("--limit", "3"), "--limit is of tasks"),
        (("--tasks", "qk_cloze", "--engine", "llama.cpp"), "computes texts"),
        (("--tasks", "qk_cloze", "--engine", "pagd"), "did you mean `paged`"),
        (("--tasks", "qk_cloze", "--include-path", "no/such"), "no/such: not a folder"),
        (("--tasks", "missing.yaml"), "missing.yaml: cannot be read"),
    ],
)
def test_wrong_options_are_one_line(options: tuple[str, ...], words: str) -> None:
    assert words in refused("eval", MODEL, *options)


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest_names() -> None:
    assert "did you mean `qk_cloze`" in refused("eval", MODEL, "--tasks", "qk_clze")
    command = ("lm-eval", "--model", "quantkit", "--model_args", f"pretrained={MODEL}", "--tasks")
    assert "`arc_easy`" in refused(*command, "arc_eazy")
    assert "needs the Hugging Face Hub" in refused("eval", MODEL, "--tasks", "arc_easy")


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 4095, "content": "<other>"})
    file.write_text(json.dumps(content))
    assert "tokenizers of" in refused("eval", MODEL, "--ref", tmp_path / "other", "--tasks", "qk_cloze")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit_eval.tasks.task_files.find_spec", lambda name: None)
    assert "quantkit[lm-eval]" in refused("eval", MODEL, "--tasks", "qk_cloze")
    assert "quantkit[lm-eval]" in refused("lm-eval", "--help")


def test_own_tasks_are_in_the_wheel_or_the_checkout() -> None:
    folder = own_tasks()
    assert folder is not None
    assert {f"{name}.{end}" for name in OWN for end in ("yaml", "jsonl")} <= {file.name for file in folder.iterdir()}
