"""The public names: all there, imported on first use, whatever was imported before, and typed for those who check."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"quantkit": ROOT, "quantkit_kernels": ROOT / "kernels", "quantkit_eval": ROOT / "eval"}
SCRIPT = '''
"""What a user writes."""

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import Recipe, Report, RunError, UserError

logging.basicConfig(level=logging.INFO)


def run(name: str, out: Path) -> str:
    try:
        report = quantkit.quantize(name, "gptq-w4a16", out, calibration=["one text", "another"], progress="plain")
    except (UserError, RunError) as error:
        return str(error)
    bits: float = report.bits_per_weight
    model = quantkit.load(out, dtype=torch.bfloat16, device="auto")
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=8)
    kl = quantkit.evaluate(out, ref=name, text=out / "text.txt")
    verdict: str = quantkit.verify(out, "vllm", tp=2, hardware="h100").verdict
    held = quantkit.inspect(str(out))["format"]
    converted = quantkit.convert(out, out.with_name("awq"), "awq")
    fits: bool = quantkit.plan(name, {"scheme": "W4A16"}).fits
    names = [row.name for row in quantkit.recipes()]
    return f"{bits} {kl} {verdict} {held} {converted.modules} {fits} {names} {quantkit.__version__}"


def in_memory(name: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    recipe = Recipe(scheme="W4A16", weights={"algorithm": "gptq"}, calibration={"data": "general"})
    chats = [[{"role": "user", "content": "hello"}]]
    report, quantized = quantkit.quantize_module(model, recipe, calibration=chats, tokenizer=tokenizer)
    quantkit.save(quantized, "out")
    again: Recipe = Recipe(**report.recipe)
    same: Report = Report.load("out")
    print(report.to_json()["bits_per_weight"], again.resolved(), same.model, Report.from_json(same.to_json()))
    return quantized


batches = ({"input_ids": ids} for ids in torch.ones(4, 8, dtype=torch.int64))
quantkit.quantize("model", Path("recipe.yaml"), "out", calibration=batches, device=torch.device("cpu"), progress=False)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def check(*command: str | Path, folder: Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_takes_a_users_script(script: Path) -> None:
    pytest.importorskip("pyright", reason="pyright is a development tool")
    paths = ", ".join(f'"{path}"' for path in PACKAGES.values())
    (script.parent / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "standard", "extraPaths": [{paths}]}}')
    check(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, script.name, folder=script.parent)


def test_mypy_takes_a_users_script(script: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is a development tool")
    (script.parent / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {':'.join(map(str, PACKAGES.values()))}\n"
        "follow_imports = silent\n"
        "[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"  # half a minute to read
    )
    check(sys.executable, "-m", "mypy", "--strict", script.name, folder=script.parent)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package: str) -> None:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    assert (Path(found.origin).parent / "py.typed").exists()


def test_names_are_complete() -> None:
    names = [name for name in dir(quantkit) if not name.startswith("__")]
    assert {*names, "__version__"} == {*quantkit.__all__}
    for name in names:
        assert inspect.getdoc(getattr(quantkit, name)), f"{name} says nothing"
    with pytest.raises(AttributeError, match="quantise"):
        _ = quantkit.quantise
    star: dict[str, object] = {}
    exec("from quantkit import *", star)
    assert set(quantkit.__all__) <= set(star)


def test_functions_stay_functions_whatever_is_imported() -> None:
    """A module imported inside a package becomes an attribute of it: none may have a public function's name."""
    script = """
import importlib, pkgutil, quantkit
for module in pkgutil.walk_packages(quantkit.__path__, "quantkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in quantkit.__all__:
    assert type(getattr(quantkit, name)).__name__ != "module", name
assert all(callable(getattr(quantkit, name)) for name in quantkit.__all__ if name != "__version__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "call",
    [
        f"quantkit.verify({str(ROOT / 'examples' / 'tiny-llama')!r})",
        "quantkit.recipes()",
        "quantkit.Recipe()",
        "quantkit.Report",
        "quantkit.__version__",
    ],
)
def test_what_needs_no_torch_loads_none(call: str) -> None:
    script = f"import sys, quantkit\n{call}\nassert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
