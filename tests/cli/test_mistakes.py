"""What newcomers get wrong, and the one message each of it is answered with: what, where, and what to do.

All of LIGHT are answered before torch and transformers are imported: one process runs them, in which both imports fail.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.checkpoint.output_folder import versions
from quantkit.cli import main as cli
from quantkit.recipe.load import load

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-llama"
TEXT = TINY / "calibration.txt"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A command, and words of the answer in their order. number: of the list the mistakes were collected in."""

    number: int | str
    command: str
    words: tuple[str, ...]
    code: int = 2


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """A file of zeros: name -> (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def config(**changes: Any) -> str:
    return json.dumps(json.loads((TINY / "config.json").read_text()) | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything a newcomer may point at."""
    here = tmp_path_factory.mktemp("place")

    def folder(name: str, **files: str | bytes) -> Path:
        (here / name).mkdir()
        for file, content in files.items():
            path = here / name / file.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return here / name

    one = {"model.norm.weight": ("BF16", [256], 512)}
    shutil.copytree(TINY, here / "tiny")
    folder("empty")
    folder("exists")
    folder("home")
    (here / "home" / "exists").mkdir()
    folder("gguf", model__gguf=b"GGUF" + bytes(60))
    folder("lora", adapter_config__json='{"base_model_name_or_path": "org/base"}', adapter_model__safetensors=b"")
    safetensors(folder("weights-only") / "model.safetensors", one)
    folder("broken-config", config__json='{"model_type": "llama",', model__safetensors=b"")
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    safetensors(folder("bert", config__json=config(**bert)) / "model.safetensors", one)
    safetensors(folder("no-tokenizer", config__json=config()) / "model.safetensors", one)
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    safetensors(folder("quantized", config__json=config(quantization_config=quantized)) / "model.safetensors", one)
    shutil.copytree(TINY, here / "truncated")
    weights = here / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    recipe = "weights:\n  bitz: 4\n  group_size: '64'\nignor: [lm_head]\n"
    (here / "typos.yaml").write_text(recipe)
    (here / "tab.yaml").write_text("weights:\n\tbits: 4\n")
    (here / "both.yaml").write_text("scheme: W4A16\nweights: {bits: 8}\n")
    began = {"recipe": load("rtn-w8a16", model="tiny").settings(), "versions": versions()}
    (folder("changed.partial") / "journal.jsonl").write_text(json.dumps(began) + "\n")
    folder("foreign.partial", notes__txt="mine")
    (here / "keys.jsonl").write_text('{"body": "x"}\n')
    (here / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    (here / "short.txt").write_text("a few words only\n")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (here / "overrides.yaml").write_text('overrides: [{match: "re:.*down_porj", skip: true}]\ncalibration: {}\n')
    return here


LIGHT = [
    Mistake(1, "quantize ./nope -r rtn-w8a16 -o OUT", ("nope: no such folder", "hint:", "model folder")),
    Mistake(1, "quantize ../nope -r rtn-w8a16 -o OUT", ("../nope: no such folder", "hint:")),
    Mistake(1, "quantize /nope -r rtn-w8a16 -o OUT", ("/nope: no such folder", "hint:")),
    Mistake(1, "quantize nope/ -r rtn-w8a16 -o OUT", ("nope/: no such folder", "hint:")),
    Mistake(1, "quantize a/b/c -r rtn-w8a16 -o OUT", ("a/b/c: no such folder", "hint:")),
    Mistake(1, "quantize C:\\models\\llama -r rtn-w8a16 -o OUT", ("C:\\models\\llama: no such folder", "hint:")),
    Mistake(1, "quantize ~/nope -r rtn-w8a16 -o OUT", ("home/nope: no such folder", "hint:")),
    Mistake(2, "quantize org/absent -r rtn-w8a16 -o OUT", ("org/absent", "the Hub cannot be reached", "hint:")),
    Mistake(3, "quantize tiny -r typos.yaml -o OUT", ("typos.yaml:2: weights.bitz:", "did you mean 'bits'?")),
    Mistake(3, "recipes check typos.yaml", ("typos.yaml:4: ignor: unknown key; did you mean 'ignore'?",)),
    Mistake(4, "quantize tiny -r rtn-w8a16 -o OUT --set wieghts.bits=4", ("--set wieghts.bits=4", "'weights'?")),
    Mistake(5, "quantize tiny -r rtn-w8a16 -o OUT --bits four", ("--bits four: weights.bits: must be a whole number",)),
    Mistake(6, "recipes check typos.yaml", ("typos.yaml:3: weights.group_size: must be a positive whole number",)),
    Mistake(7, "quantize tiny -r rtn-w8a16", ("no output folder: pass --output", "hint:")),
    Mistake(8, "quantize tiny -r rtn-w8a16 -o exists", ("exists exists", "never overwritten", "hint:", "--output")),
    Mistake(9, "quantize quantized -r rtn-w8a16 -o OUT", ("quantized", "already quantized")),
    Mistake(10, "verify tiny --engine vlm", ("unknown engine 'vlm'", "hint: did you mean `vllm`?")),
    Mistake(10, "verify tiny --hardware h10", ("unknown hardware 'h10'", "hint: did you mean `h100`?")),
    Mistake(10, "recipes --engine sglan", ("unknown engine 'sglan'", "hint: did you mean `sglang`?")),
    Mistake(10, "recipes --for h10", ("unknown hardware 'h10'", "hint: did you mean `h100`?")),
    Mistake(12, "quantize tiny -r awq --calibration ./nope.txt -o OUT", ("nope.txt",)),
    Mistake(14, "quantize tiny -r rtn-w8a16 -o OUT --device gpu", ("'gpu'", "hint: did you mean `cuda`?")),
    Mistake(14, "quantize tiny -r rtn-w8a16 -o OUT --device cuda1", ("'cuda1'", "hint: did you mean `cuda:1`?")),
    Mistake(14, "eval tiny --text tiny/eval.txt --device gpu", ("'gpu'", "hint: did you mean `cuda`?")),
    Mistake(15, "quantize gguf/model.gguf -r rtn-w8a16 -o OUT", ("model.gguf", "GGUF", "hint:", "original model")),
    Mistake(16, "quantize gguf -r rtn-w8a16 -o OUT", ("gguf", "GGUF", "hint:", "original model")),
    Mistake(17, "quantize lora -r rtn-w8a16 -o OUT", ("lora", "adapter", "org/base", "merge")),
    Mistake(18, "quantize no-tokenizer -r awq -o OUT", ("no-tokenizer", "tokenizer", "copy the tokenizer files")),
    Mistake(19, "quantize tiny -r rtn-w8a16 -o /proc/out", ("/proc/out cannot be made", "hint:", "--output")),
    Mistake(20, "quantize truncated -r rtn-w8a16 -o OUT", ("truncated", "model.safetensors", "bytes")),
    Mistake(21, "quantize broken-config -r rtn-w8a16 -o OUT", ("broken-config", "config.json", "JSON")),
    Mistake(22, "quantize weights-only -r rtn-w8a16 -o OUT", ("weights-only", "config.json", "hint:")),
    Mistake(23, "quantize empty -r rtn-w8a16 -o OUT", ("empty", "hint:", "config.json")),
    Mistake(24, "quantize bert -r rtn-w8a16 -o OUT", ("bert", "BertForMaskedLM", "hint:")),
    Mistake(25, "quantize tiny -r gptq-w4a61 -o OUT", ("file named `gptq-w4a61`", "hint:", "`gptq-w4a16`?")),
    Mistake(26, "quantize tiny --scheme W4A17 -o OUT", ("no scheme named `W4A17`", "hint: did you mean `W4A16`?")),
    Mistake(26, "quantize tiny -o OUT", ("no recipe and no scheme", "hint: pass --scheme W4A16", "--recipe")),
    Mistake(27, "quantize tiny -r iq3_xxs -o OUT", ("`iq3_xxs` is a lattice type of llama.cpp's", "hint:", "gguf-q")),
    Mistake(28, "quantize tiny -r awq -o OUT --set bits", ("--set bits: write it as key.path=value",)),
    Mistake(29, "quantize tiny/model.safetensors -r rtn-w8a16 -o OUT", ("model.safetensors", "hint: ", "tiny")),
    Mistake(36, "convert quantized OUT --format awk", ("unknown format 'awk'", "hint: did you mean `awq`?")),
    Mistake(38, "quantize tiny -r tab.yaml -o OUT", ("tab.yaml:2: not valid YAML", "bits: 4")),
    Mistake(39, "quantize tiny -r both.yaml -o OUT", ("both.yaml:2: weights.bits: 8 contradicts `scheme: W4A16`",)),
    Mistake(39, "quantize tiny --scheme W4A16 --bits 8 -o OUT", ("--bits 8: weights.bits: 8 contradicts",)),
    Mistake(40, "quantise tiny -r awq -o OUT", ("no verb `quantise`", "hint: did you mean `quantkit quantize`?")),
    Mistake(40, "evaluate tiny", ("no verb `evaluate`", "hint: did you mean `quantkit eval`?")),
    Mistake(40, "recipes shwo awq", ("no verb `shwo`", "hint: did you mean `quantkit recipes show`?")),
    Mistake(40, "quantize tiny --modle x", ("no option `--modle`", "hint: did you mean `--model`?")),
    Mistake(40, "quantize tiny --group_size 64", ("no option `--group_size`", "hint: did you mean `--group-size`?")),
    Mistake(40, "quantize tiny --device", ("'--device' requires an argument", "hint:", "--help")),
    Mistake(40, "inspect", ("quantkit inspect: missing argument", "hint:", "--help")),
    Mistake(41, "quantize tiny -m other -r awq -o OUT", ("two models: tiny and --model other", "hint:")),
    Mistake(46, "eval org/absent --text tiny/eval.txt", ("org/absent", "the Hub cannot be reached", "hint:")),
    Mistake(46, "eval lora --text tiny/eval.txt", ("lora", "adapter", "org/base", "merge")),
    Mistake(46, "eval tiny --ref gguf --text tiny/eval.txt", ("gguf", "GGUF", "hint:")),
    Mistake("g", "generate tiny --prompt x --file y", ("--prompt and --file are both given", "hint:")),
    Mistake("g", "generate tiny --file nope.txt", ("nope.txt: the prompt cannot be read: No such file",)),
    Mistake("g", "generate tiny --file binary.txt", ("binary.txt: not UTF-8 text",)),
    Mistake("g", "generate tiny --chat", ("tiny: it has no chat template", "hint: leave out --chat")),
    Mistake("g", "generate tiny --chat --json", ("--json shows one answer", "hint: give the message as --prompt")),
    Mistake("g", "generate tiny --prompt x --top-p 2", ("top_p is 2.0; expected more than 0, at most 1",)),
    Mistake("g", "generate tiny --prompt x --max-tokens 0", ("max_tokens is 0; expected 1 or more",)),
    Mistake("g", "generate tiny --prompt x --speculate n-gram", ("'n-gram'", "hint: did you mean `ngram`?")),
    Mistake("g", "generate tiny --prompt x --dtype bf16", ("unknown dtype 'bf16'", "hint: did you mean `bfloat16`?")),
    Mistake("g", "generate tiny --prompt x --device gpu", ("'gpu'", "hint: did you mean `cuda`?")),
    Mistake("g", "generate tiny --prompt x --draft ./nope", ("nope: no such folder", "hint:")),
    Mistake("g", "generate tiny --prompt x --draft bert", ("bert", "BertForMaskedLM")),
    Mistake("g", "generate tiny -p x --draft tiny --speculate ngram", ("--speculate and --draft are both", "hint:")),
    Mistake("g", "generate tiny -p x --kv-cache int9", ("'int9'", "hint: did you mean")),
    Mistake("g", "generate tiny -p x --kv keys=int8", ("'keys=int8' says nothing of the values", "hint:")),
    Mistake("g", "eval tiny --text tiny/eval.txt --engine pagd", ("'pagd'", "hint: did you mean `paged`?")),
    Mistake("g", "generate no-tokenizer --prompt x", ("no-tokenizer", "tokenizer", "copy the tokenizer files")),
    Mistake("g", "generate org/absent --prompt x", ("org/absent", "the Hub cannot be reached", "hint:")),
    Mistake("b", "bench tiny --input 8:2000", ("2000 tokens in and", "context has 1024", "hint: shorter --input")),
    Mistake("b", "bench tiny --input 9:8", ("--input is '9:8'",)),
    Mistake("b", "bench tiny --requests 0", ("--requests is 0",)),
    Mistake("b", "bench tiny --rate 2 --prefill 8", ("--rate is for mixed requests", "hint:")),
    Mistake("b", "bench tiny --baseline genrate", ("unknown baseline 'genrate'", "hint: did you mean `generate`?")),
    Mistake("b", "bench tiny --baseline bert", ("bert", "BertForMaskedLM")),
    Mistake("b", "bench tiny --llamacpp empty", ("empty: no llama-bench in it", "hint:")),
    Mistake("b", "bench tiny --json short.txt", ("--json short.txt: exists, and is never overwritten", "hint:")),
    Mistake("b", "bench tiny --kv-cache int9", ("'int9'", "hint:")),
    Mistake("b", "benchmark tiny", ("no verb `benchmark`", "hint: did you mean `quantkit bench`?")),
    Mistake("g", "chat tiny", ("no verb `chat`", "hint: did you mean `quantkit generate`?")),
    Mistake(49, "convert gguf/model.gguf OUT --format awq", ("model.gguf", "GGUF", "hint:")),
    Mistake(50, "convert tiny OUT --format awq", ("tiny", "not quantized", "hint:")),
    Mistake(57, "verify lora", ("lora", "adapter", "org/base", "merge")),
    Mistake(58, "verify gguf", ("gguf", "GGUF", "hint:")),
    Mistake(58, "verify gguf/model.gguf", ("model.gguf", "GGUF", "hint:")),
    Mistake(58, "inspect gguf", ("gguf", "GGUF", "hint:")),
    Mistake(58, "inspect ~/nope", ("home/nope: no such folder", "hint:")),
    Mistake(59, "quantize -r awq -o OUT", ("no model: pass --model",)),
    Mistake(59, "plan -r awq", ("no model: pass --model",)),
    Mistake(302, "quantize tiny -r rtn-w8a16 -o ~/exists", ("home/exists exists", "hint:")),
    Mistake(302, "quantize tiny -r ~/nope.yaml -o OUT", ("no recipe or file named `~/nope.yaml`", "hint:")),
    Mistake(302, "quantize tiny -r awq --calibration ~/nope.txt -o OUT", ("home/nope.txt",)),
    Mistake(302, "quantize tiny -r awq --set calibration.data=~/nope.txt -o OUT", ("home/nope.txt",)),
    Mistake(302, "quantize ~nobody-here/m -r awq -o OUT", ("no home folder for '~nobody-here'", "hint:")),
    Mistake(302, "quantize tiny -r rtn-w8a16 -o ~nobody-here/x", ("no home folder for '~nobody-here'", "hint:")),
    Mistake(302, "verify ~nobody-here/m", ("no home folder for '~nobody-here'", "hint:")),
    Mistake(302, "verify ~/nope", ("nope: no such folder", "hint:")),
    Mistake(302, "convert quantized ~/exists --format awq", ("home/exists exists", "hint:")),
    Mistake(302, "convert ~/nope OUT --format awq", ("home/nope: no such folder", "hint:")),
    Mistake(302, "eval tiny --text ~/nope.txt", ("nope.txt",)),
    Mistake(302, "eval tiny --ref ~/nope --text tiny/eval.txt", ("home/nope: no such folder", "hint:")),
    Mistake("changed", "quantize tiny -r rtn-w8a16 --bits 4 -o changed", ("weights.bits: 8 -> 4", "--restart")),
    Mistake("foreign", "quantize tiny -r rtn-w8a16 -o foreign", ("foreign.partial",)),
    Mistake("json", "quantize ./nope -r awq -o OUT --json", ("nope: no such folder", "hint:")),
    Mistake("json", "plan ./nope -r awq --json", ("nope: no such folder", "hint:")),
    Mistake("json", "eval ./nope --json", ("nope: no such folder", "hint:")),
    Mistake("json", "inspect ./nope --json", ("nope: no such folder", "hint:")),
    Mistake("json", "verify ./nope --json", ("nope: no such folder", "hint:")),
    Mistake("json", "convert ./nope OUT --format awq --json", ("nope: no such folder", "hint:")),
    Mistake("json", "recipes --for h10 --json", ("unknown hardware 'h10'", "hint:")),
    Mistake("json", "recipes show awk --json", ("no recipe or file named `awk`", "hint:")),
    Mistake("json", "env --json --modle", ("no option `--modle`", "hint:")),
    Mistake("progress", "quantize tiny -r awq -o OUT --progress plan", ("'plan'", "hint: did you mean `plain`?")),
]

RUNNER = """
import json, sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets"):
            raise RuntimeError(f"{name} is imported before the mistake is answered")

sys.meta_path.insert(0, Refuses())
from typer.testing import CliRunner
from quantkit.cli.main import app
for command in json.load(sys.stdin):
    result = CliRunner().invoke(app, command.split(" "), prog_name="quantkit")
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, tuple[int, str, str]]:
    """Command -> exit code, stdout, stderr, of all that are answered without torch."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    environment = os.environ | {"PYTHONPATH": paths, "HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    commands = [mistake.command for mistake in LIGHT]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=place,
        env=environment,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


def assert_answers(mistake: Mistake, code: int, stdout: str, stderr: str) -> None:
    assert code == mistake.code, stderr
    assert stdout == ""
    assert stderr.startswith("error: "), stderr
    assert stderr.count("error: ") == 1, stderr
    assert "Traceback" not in stderr
    assert "unexpected" not in stderr
    at = 0
    for word in mistake.words:  # what and where come before what to do
        found = stderr.find(word, at)
        assert found >= 0, f"{word!r} is not in its place in: {stderr}"
        at = found


@pytest.mark.parametrize("mistake", LIGHT, ids=lambda mistake: f"{mistake.number}: {mistake.command}")
def test_answered_before_torch(mistake: Mistake, answers: dict[str, tuple[int, str, str]], place: Path) -> None:
    assert_answers(mistake, *answers[mistake.command])
    assert not list(place.glob("OUT*"))
    assert not list(place.glob("home/*OUT*"))


FEW = "--calibration tiny/calibration.txt --samples 2 --seq-len 32 -o OUT"
HEAVY = [
    Mistake(11, "quantize tiny -r rtn-w4a16 --group-size 96 " + FEW, ("96", "256", "on_misfit")),
    Mistake(13, "quantize tiny -r rtn-w8a16 -o OUT --device cuda:99", ("device 'cuda:99' cannot be used", "hint:")),
    Mistake(30, "quantize tiny -r awq --calibration keys.jsonl -o OUT", ("keys.jsonl", "text", "messages")),
    Mistake(31, "quantize tiny -r awq --calibration chats.jsonl -o OUT", ("chat template",)),
    Mistake(32, "quantize tiny -r awq --calibration short.txt --samples 8 --seq-len 64 -o OUT", ("short.txt", "lower")),
    Mistake(33, "quantize tiny -r awq --calibration binary.txt -o OUT", ("binary.txt", "UTF-8")),
    Mistake(
        34,
        "quantize tiny -r awq --calibration org/absent -o OUT",
        ("org/absent", "not in the cache", "hint:", "general"),
    ),
    Mistake(35, "quantize tiny -r awq --seq-len 4096 --calibration tiny/calibration.txt -o OUT", ("4096", "1024")),
    Mistake(37, "quantize tiny -r rtn-w4a16 --set output.engine=tensorrt-llm " + FEW, ("tensorrt-llm", "engine")),
    Mistake(306, "quantize tiny -r overrides.yaml " + FEW, ("overrides.0.match", "down_porj", "down_proj")),
    Mistake(318, "quantize tiny -r rtn-w4a16 --set output.tp=3 " + FEW, ("vllm on 3 devices",)),
]


@pytest.mark.parametrize("mistake", HEAVY, ids=lambda mistake: f"{mistake.number}: {mistake.command}")
def test_answered_before_any_work(mistake: Mistake, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    quiet = ["-q"] if mistake.command.startswith("quantize") else []
    result = CliRunner().invoke(cli.app, [*mistake.command.split(" "), *quiet], prog_name="quantkit")
    assert_answers(mistake, result.exit_code, result.stdout, result.stderr)
    assert not list(place.glob("OUT*"))


TAKEN = {
    "AWQ": "recipe: awq (for AWQ)",
    "W4A16": "recipe: gptq-w4a16 (for W4A16)",
    "fp8_dynamic": "recipe: fp8-dynamic (for fp8_dynamic)",
    "int4": "recipe: gptq-w4a16 (for int4)",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_recipe_in_another_spelling_is_taken_and_named(name: str, tmp_path: Path) -> None:
    for option in ("-r", "--scheme") if name in ("W4A16", "fp8_dynamic") else ("-r",):
        result = CliRunner().invoke(cli.app, ["quantize", str(tmp_path / "nope"), option, name, "-o", "OUT"])
        note, *error = result.stderr.splitlines()
        assert note == (TAKEN[name] if option == "-r" else TAKEN[name].replace(name, name.upper()))
        assert error[0].startswith(f"error: {tmp_path}/nope: no such folder")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from quantkit.quantization import pipeline

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", interrupt)
    result = CliRunner().invoke(cli.app, ["quantize", str(TINY), "-r", "rtn-w8a16", "-o", str(tmp_path / "o"), "-q"])
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1].startswith("error: interrupted; ")
    assert "same command" in result.stderr
