"""The command line: what it hands to the verbs, what it prints, how it fails."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.cli import main as cli
from quantkit.errors import RunError, UserError
from quantkit.report.block_records import BlockRecord, GptqErrors, LinearRecord
from quantkit.report.records import Report

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples" / "tiny-llama")
GPTQ = GptqErrors(rounding=0.02, damping=0.01, tokens=4096)
REPORT = Report(
    quantkit="1.0",
    model="some/model",
    recipe={
        "weights": {"bits": 4, "group_size": 128, "symmetric": False, "algorithm": {"gptq": {}}},
        "transforms": [{"awq": {}}],
    },
    calibration=None,
    versions={"quantkit": "1.0"},
    device="cpu",
    coverage="7 of 8 linears quantized",
    weights_quantized=0.9,
    bits_per_weight=4.25,
    bytes_before=12_000_000,
    bytes_after=4_000_000,
    blocks=(BlockRecord(0, (), (LinearRecord("q_proj", "int4 asym g128", (8, 128), "gptq", 0.01, GPTQ),)),),
    skipped=(),
    rotation=None,
    kv_cache=None,
    folds_rejected=(),
    warnings=tuple(f"layer {i} [odd]: damping raised" for i in range(12)),
    seconds={"quantize": 3.21},
    peak_memory_bytes=300 << 20,
    files={},
)


class Pipeline:
    """Stands in for quantkit.pipeline: notes its call, then returns or raises what it was told."""

    def __init__(self) -> None:
        self.call: tuple[Any, ...] | None = None
        self.raises: BaseException | None = None

    def quantize(self, recipe: Any, output: Path, **options: Any) -> Report:
        self.call = (recipe, output, options)
        if self.raises is not None:
            raise self.raises
        return REPORT


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    stand_in = Pipeline()
    monkeypatch.setitem(sys.modules, "quantkit.quantization.pipeline", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr("quantkit.quantization.early_checks.check_before_torch", lambda *_, **__: None)
    return stand_in


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def quantize(*more: str) -> Any:
    return invoke("quantize", MODEL, "--recipe", "awq", "--output", "out", *more)


def test_quantize_hands_everything_over(pipeline: Pipeline) -> None:
    result = quantize(
        *("--model", MODEL, "--device", "cpu", "--set", "weights.bits=3", "--set", "weights.group_size=32"),
        *("--restart", "--trust-remote-code"),
    )
    assert result.exit_code == 0, result.output
    assert pipeline.call is not None
    recipe, output, options = pipeline.call
    assert (recipe.model, recipe.weights.bits, recipe.weights.group_size, output) == (MODEL, 3, 32, Path("out"))
    assert options == {"device": "cpu", "restart": True, "trust_remote_code": True, "progress": "auto"}


def test_table_of_a_run(pipeline: Pipeline) -> None:
    output = quantize().output
    for text in ("awq + gptq, int4 asym g128", "7 of 8", "4 MB, 33% of 12 MB", "4.25", "315 MB"):
        assert text in output
    assert "layer 9 [odd]: damping raised" in output
    assert "layer 10" not in output
    assert "2 more warnings" in output


def test_json_is_all_there_is_on_stdout(pipeline: Pipeline) -> None:
    result = quantize("--json")
    assert json.loads(result.stdout) == REPORT.to_json()
    assert result.stderr == f"quantizing {MODEL} into out\n"
    quiet = quantize("--json", "--quiet")
    assert (json.loads(quiet.stdout), quiet.stderr) == (REPORT.to_json(), "")
    assert pipeline.call is not None
    assert pipeline.call[2]["progress"] == "off"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no such layer"), 2, "error: no such layer"),
        (RunError("disk full: 3 GB needed"), 1, "error: disk full: 3 GB needed"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "error: out/x: No space left on device"),
        (KeyboardInterrupt(), 130, "same command"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops"),
    ],
    ids=["user", "run", "disk", "interrupt", "bug"],
)
def test_failures_are_one_message_and_a_code(pipeline: Pipeline, error: BaseException, code: int, message: str) -> None:
    pipeline.raises = error
    result = quantize()
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback_and_keeps_the_code(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.raises = UserError("no such layer")
    arguments = ("quantize", MODEL, "--recipe", "awq", "--output", "out")
    flag = invoke("--debug", *arguments)
    monkeypatch.setenv("QUANTKIT_DEBUG", "1")
    for result in (flag, invoke(*arguments)):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "error: no such layer" in result.stderr


def test_recipe_problems_come_before_any_work(pipeline: Pipeline) -> None:
    result = quantize("--set", "weights.grop_size=64")
    assert result.exit_code == 2
    assert "--set weights.grop_size=64: weights.grop_size: unknown key; did you mean 'group_size'?" in result.stderr
    assert pipeline.call is None


@pytest.mark.parametrize("arguments", [("quantize",), ("nonsense",), ("eval", "x"), ("quantize", "--bogus")], ids=str)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_eval_and_inspect_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Module:
        @staticmethod
        def evaluate(path: str, **options: Any) -> Report:
            calls.append((path, options))
            return {"perplexity": 1.5}

        @staticmethod
        def inspect_folder(path: Path) -> dict[str, Any]:
            return {"bits": 4}

        @staticmethod
        def render(result: dict[str, Any], console: Any) -> None:
            console.print(f"shown {result}")

        render_inspection = render

    monkeypatch.setattr("quantkit_eval.early_checks.check_before_torch", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "quantkit.report.console", Module)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "quantkit_eval", Module)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "quantkit.inspection", Module)  # type: ignore[arg-type]
    arguments = ("eval", "m", "--ref", "r", "--text", "t.txt", "--context", "64", "--tokens", "100")
    assert "shown" in invoke(*arguments).output
    assert json.loads(invoke(*arguments, "--json").output) == {"perplexity": 1.5}
    path, options = calls[0]
    assert (path, options["ref"], options["text"], options["bos"]) == ("m", "r", ["t.txt"], "auto")
    assert (options["context"], options["tokens"], options["device"]) == (64, 100, "auto")
    invoke("eval", "m")
    assert calls[-1][1]["text"] == ["general"]
    assert json.loads(invoke("inspect", "m", "--json").output) == {"bits": 4}
    assert "shown" in invoke("inspect", "m").output


def test_recipes_verbs(tmp_path: Path) -> None:
    assert invoke("recipes", "show", "awq").output == (ROOT / "recipes" / "awq.yaml").read_text()
    assert json.loads(invoke("recipes", "schema").output)["type"] == "object"
    assert "ok" in invoke("recipes", "check", "awq").output
    (tmp_path / "bad.yaml").write_text("weights:\n  bitz: 4\n")
    result = invoke("recipes", "check", str(tmp_path / "bad.yaml"))
    assert result.exit_code == 2
    assert "bad.yaml:2: weights.bitz: unknown key; did you mean 'bits'?" in result.stderr
    assert invoke("recipes", "show", "awk").exit_code == 2
    checked = invoke("recipes", "check", str(tmp_path / "bad.yaml"), "--json")
    assert (checked.exit_code, checked.stderr) == (2, "")
    found = json.loads(checked.stdout)
    assert (found["ok"], len(found["problems"])) == (False, 1)
    assert "did you mean 'bits'?" in found["problems"][0]
    assert json.loads(invoke("recipes", "check", "awq", "--json").stdout) == {"ok": True, "problems": []}
    assert json.loads(invoke("recipes", "show", "awq", "--json").stdout)["weights"]["bits"] == 4


def test_options_are_frozen() -> None:
    """A new option belongs into the recipe first; this list changes on purpose only."""
    import typer.main

    root: Any = typer.main.get_command(cli.app)
    options = {name: sorted(o for p in c.params for o in p.opts if o[:2] == "--") for name, c in root.commands.items()}
    common = ["--bits", "--calibration", "--group-size", "--json", "--model", "--recipe", "--samples", "--scheme"]
    common += ["--seq-len", "--set", "--trust-remote-code"]
    assert options == {
        "convert": [
            *("--format", "--json", "--max-shard", "--output-type", "--pre", "--requantize", "--token-embedding"),
        ],
        "bench": [
            *("--baseline", "--decode", "--device", "--draft", "--dtype", "--input", "--json", "--kv", "--kv-cache"),
            *("--llamacpp", "--max-num-batched-tokens", "--max-num-seqs", "--no-prefix-cache", "--num-blocks"),
            *("--output", "--plot", "--prefill", "--profile", "--progress", "--quiet", "--rate", "--requests"),
            *("--seed", "--shared-prefix", "--speculate", "--sweep-batch", "--trust-remote-code", "--verbose"),
        ],
        "generate": [
            *("--chat", "--context", "--device", "--draft", "--dtype", "--file", "--ignore-eos", "--json", "--kv"),
            *("--kv-cache", "--max-tokens", "--min-p", "--prompt", "--quiet", "--repetition-penalty", "--seed"),
            *("--speculate", "--stop", "--temperature", "--top-k", "--top-p", "--trust-remote-code"),
        ],
        "imatrix": [
            *("--calibration", "--data", "--device", "--json", "--model", "--output", "--progress", "--quiet"),
            *("--samples", "--seq-len", "--trust-remote-code", "--verbose"),
        ],
        "plan": sorted(
            [
                *(*common, "--gpu", "--engine", "--context", "--concurrency", "--prompt", "--output", "--tp", "--pp"),
                *("--profile", "--price"),
            ]
        ),
        "sweep": [
            *("--context", "--device", "--grid", "--jobs", "--json", "--keep", "--limit", "--model", "--output"),
            *("--progress", "--quiet", "--ray", "--recipe", "--search", "--seed", "--tasks", "--text", "--tokens"),
            *("--trust-remote-code", "--verbose"),
        ],
        "verify": ["--checksums", "--engine", "--hardware", "--json", "--tp"],
        "quantize": sorted(
            [*common, "--device", "--output", "--progress", "--quiet", "--report", "--restart", "--verbose"]
        ),
        "eval": [
            *("--acceptance", "--bos", "--context", "--device", "--engine", "--include-path", "--json", "--kv"),
            *("--kv-cache", "--limit", "--num-fewshot", "--progress", "--quiet", "--ref", "--tasks", "--text"),
            *("--tokens", "--trust-remote-code", "--verbose"),
        ],
        "lm-eval": [],  # its own command has them
        "auto": [
            *("--calibration", "--candidates", "--device", "--engine", "--json", "--max-size", "--model", "--output"),
            *("--progress", "--quiet", "--restart", "--samples", "--seq-len", "--text", "--tp"),
            *("--trust-remote-code", "--verbose"),
        ],
        "report": [
            *("--context", "--device", "--json", "--output", "--progress", "--quiet", "--ref", "--results"),
            *("--schema", "--text", "--tokens", "--trust-remote-code", "--verbose"),
        ],
        "push": ["--json", "--private"],
        "inspect": ["--json"],
        "recipes": ["--engine", "--for", "--json"],
        "env": ["--json"],
    }


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = "import sys, quantkit.cli.main as c\ntry: c.main()\nfinally: print([m for m in HEAVY if m in sys.modules])"
    heavy = ["torch", "transformers", "pydantic", "numpy", "datasets", "ruamel.yaml", "rich.console"]
    shown = python("-c", f"HEAVY = {heavy}; import sys; sys.argv = ['quantkit', '--help']\n{code}")
    assert shown.stdout.splitlines()[-1] == "[]", shown.stdout + shown.stderr
    assert "quantize" in shown.stdout
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert python("-m", "quantkit", "--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, f"--help took {seconds}"


def test_recipes_load_without_torch() -> None:
    code = "import sys; from quantkit.recipe.load import load; load('awq'); print('torch' in sys.modules)"
    assert python("-c", code).stdout.strip() == "False"


def test_the_table_of_recipes_is_made_without_torch() -> None:
    code = "import sys, quantkit.cli.main as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    listed = python("-c", f"import sys; sys.argv = ['quantkit', 'recipes', '--for', 'h100']\n{code}").stdout
    assert "gptq-w4a16" in listed
    assert listed.splitlines()[-1] == "False"


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option: str) -> None:
    result = invoke(option)
    assert result.exit_code == 0
    assert result.output.startswith("quantkit")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("quantize -r gptq-w4", {"gptq-w4a16", "gptq-w4a16-g32"}),
        ("plan --scheme NV", {"NVFP4", "NVFP4A16"}),
        ("verify x --engine tr", {"transformers"}),
        ("convert a b --format g", {"gguf", "gptq", "gptq_v2"}),
        ("recipes show fp8-d", {"fp8-dynamic", "fp8-dynamic-gptq"}),
        ("quantize --sam", {"--samples"}),
    ],
)
def test_completion(typed: str, offered: set[str]) -> None:
    words = f"quantkit {typed}"
    environment = {"_QUANTKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(cli.app, [], env=environment, prog_name="quantkit", complete_var="_QUANTKIT_COMPLETE")
    assert set(result.stdout.split()) == offered
    assert "--install-completion" in invoke("--help").output


VERBS = ["quantize", "eval", "generate", "bench", "sweep", "auto", "report", "push", "inspect", "convert", "verify"]
VERBS += ["plan", "imatrix", "recipes", "env"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json(verb: str) -> None:
    assert "--json" in invoke(verb, "--help").output


@pytest.mark.parametrize("verb", ["show", "check", "schema"])
def test_every_verb_of_recipes_has_json(verb: str) -> None:
    assert "--json" in invoke("recipes", verb, "--help").output
    if verb == "schema":
        assert json.loads(invoke("recipes", "schema", "--json").stdout)["type"] == "object"


def test_an_interrupt_while_the_command_is_imported_is_one_line() -> None:
    script = """
import sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "quantkit.cli.quantize":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
from quantkit.__main__ import main
main()
"""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
