"""verify --hardware: whether an engine has a kernel for the folder on a machine, and vLLM's limits on CPUs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.errors import UserError
from quantkit.verification import Finding, Verdict, preflight, verify_folder
from quantkit.verification.config.other_methods import make_subject
from quantkit.verification.engines.hardware import cpu_limits, find_machine, hardware
from tests.tiny_folders import CONFIGS, DENSE, MODEL, SHAPES, Folder, ct, integer


def ask(kind: str, path: Path, machine: str, engine: str = "vllm") -> Verdict:
    folder = path / kind.replace(" ", "-")
    return verify_folder(folder if folder.exists() else Folder(kind).save(folder), engine, hardware=machine)


def on_cpu(kind: str = "W4A16", tp: int = 1, **changes: int) -> str:
    shapes = {name: (changes.get("N", N), changes.get("K", K)) for name, (N, K) in SHAPES.items()}
    subject = make_subject(CONFIGS[kind], shapes, shapes, MODEL | changes, "vllm", tp)
    return hardware(subject)["CPU"]


def of_rule(result: Verdict, rule: str = "hardware") -> list[Finding]:
    return [finding for finding in result.findings if finding.rule == rule]


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("cpu", "CPU"), ("CPU", "CPU"), ("h100", "Hopper"), ("NVIDIA H100", "Hopper"), ("cuda:9.0", "Hopper"),
        ("cuda:90", "Hopper"), ("sm_90", "Hopper"), ("a100", "Ampere"), ("cuda:8.6", "Ampere"), ("sm89", "Ada"),
        ("RTX 4090", "Ada"), ("4090", "Ada"), ("L40S", "Ada"), ("t4", "Turing"), ("b200", "Blackwell SM100"),
        ("cuda:10.0", "Blackwell SM100"), ("cuda:12.0", "Blackwell SM120"), ("rtx-5090", "Blackwell SM120"),
        ("Blackwell", "Blackwell"), ("Blackwell SM120", "Blackwell SM120"), ("mi300x", "ROCm"), ("rocm", "ROCm"),
        ("xpu", "XPU"), ("hopper", "Hopper"), ("cuda:sm80", "Ampere"),
    ],
)  # fmt: skip
def test_names_of_machines(name: str, machine: str) -> None:
    assert find_machine(name) == machine


@pytest.mark.parametrize("name", ["", "gpu", "cuda", "cuda:0", "cuda:5.2", "h", "sm"])
def test_unknown_machines(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown hardware"):
        ask("W4A16", tmp_path, name)


def test_cpu_column_of_four_bits() -> None:
    """vLLM's kernel takes multiples of 32 both ways, of the merged layer and of one device's part."""
    assert on_cpu() == "yes"
    assert on_cpu(N=80) == "no"  # o_proj and down_proj are merged with nothing
    assert on_cpu(K=80) == "no"
    assert on_cpu("gptq", N=96, K=96) == "yes"
    assert on_cpu("W4A8") == "weight-only"
    assert on_cpu("W4A8", N=80) == "no"
    assert on_cpu("W8A8", N=80, K=80) == "yes"  # another kernel
    shapes = {"a.q_proj": (64, 64), "a.k_proj": (16, 64), "a.v_proj": (16, 64)}  # 96 rows together
    assert not cpu_limits(make_subject(CONFIGS["W4A16"], shapes, shapes, MODEL, "vllm", 1))
    assert cpu_limits(make_subject(CONFIGS["W4A16"], {"a.o_proj": (64, 96)}, {}, MODEL, "vllm", 1)) == []
    assert cpu_limits(make_subject(CONFIGS["W4A16"], {"a.o_proj": (64, 96)}, {}, MODEL, "vllm", 2))


@pytest.mark.parametrize("size", [16, 32, 48, 64, 72, 80, 96, 112, 128, 144, 160, 192, 224, 256, 320, 512])
@pytest.mark.parametrize("kind", ["W4A16", "W8A8", "FP8 dynamic"])
def test_cpu_heads(kind: str, size: int) -> None:
    taken = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}
    assert (on_cpu(kind, head_dim=size) == "yes") == (size in taken)
    assert (on_cpu(kind, hidden_size=size * MODEL["num_attention_heads"]) == "yes") == (size in taken)


def test_head_size_in_other_words() -> None:
    def heads(**config: int) -> int:
        return make_subject({}, {}, {}, dict(config), "vllm", 1).head_size

    assert heads(n_embd=64, n_head=4) == 16
    assert heads(d_model=64, n_heads=2) == 32
    assert heads(hidden_size=64, num_attention_heads=4, head_dim=32) == 32
    assert heads(hidden_size=64, num_attention_heads=4, kv_lora_rank=8) == 0  # latent attention has its own kernel
    assert heads(hidden_size=64) == heads(hidden_size=64, num_attention_heads=0) == 0


def test_question_of_the_folder(tmp_path: Path) -> None:
    assert ask("W4A16", tmp_path, "cpu").verdict == "loads"
    refused = ask("W8A16", tmp_path, "cpu")
    assert refused.verdict == "refused"
    assert of_rule(refused)[0].message == "vllm has no kernel for W8A16 there"
    assert "Ampere" in of_rule(refused)[0].remedy
    assert refused.hardware["CPU"] == "no"  # the table is still shown
    assert ask("W8A16", tmp_path, "a100").verdict == "loads"
    assert not of_rule(ask("W8A16", tmp_path, "a100"))
    assert ask("W4A8-FP8", tmp_path, "h100").verdict == "loads"
    assert ask("W4A8-FP8", tmp_path, "a100").verdict == "refused"
    limited = ask("FP8 block", tmp_path, "cpu")
    assert (limited.verdict, of_rule(limited)[0].level) == ("loads", "warning")
    assert "AMX only" in of_rule(limited)[0].message


def test_question_of_other_engines(tmp_path: Path) -> None:
    assert ask("W4A16", tmp_path, "t4", "sglang").verdict == "refused"
    assert [f.level for f in of_rule(ask("W4A16", tmp_path, "h100", "transformers"))] == ["info"]
    assert [f.level for f in of_rule(ask("W4A16", tmp_path, "rocm", "sglang"))] == ["info"]
    assert ask("NVFP4", tmp_path, "cpu", "tensorrt-llm").verdict == "refused"
    assert ask("NVFP4", tmp_path, "b200", "tensorrt-llm").verdict == "loads"
    half = of_rule(ask("FP8 block", tmp_path, "blackwell", "tensorrt-llm"))
    assert "Blackwell SM100 yes, Blackwell SM120 no" in half[0].message
    whole = verify_folder(tmp_path / "W4A16", hardware="t4")
    assert whole.engines is not None
    assert whole.verdict == "loads"
    assert whole.engines["sglang"].verdict == "refused"


def test_heads_of_an_unquantized_model(tmp_path: Path) -> None:
    folder = Folder("dense")
    folder.config["head_dim"] = 16
    path = folder.save(tmp_path / "model")
    assert verify_folder(path, "vllm").verdict == "loads"
    assert "heads of 16" in of_rule(verify_folder(path, "vllm", hardware="cpu"))[0].message
    assert verify_folder(path, "vllm", hardware="h100").verdict == "loads"


def test_what_cpus_do_unasked(tmp_path: Path) -> None:
    """int8 inputs with AMX in bfloat16; no float32 in the 4-bit kernel."""
    assert of_rule(ask("W4A16", tmp_path, "cpu"), "cpu-float32")[0].level == "info"
    assert not of_rule(ask("W8A8", tmp_path, "cpu"), "cpu-float32")
    for kind in ("W4A16", "W4A16 asym", "gptq", "awq"):
        found = preflight(CONFIGS[kind], SHAPES, SHAPES | DENSE, MODEL, "vllm")
        assert [f.level for f in found if f.rule == "cpu-int8-inputs"] == ["info"], kind
    for config, model in (
        (CONFIGS["W8A8"], {}),
        (CONFIGS["W4A16"], {"dtype": "float16"}),
        (ct(integer(3, 32), "pack-quantized"), {}),
    ):
        found = preflight(config, SHAPES, SHAPES | DENSE, MODEL | model, "vllm")
        assert "cpu-int8-inputs" not in {f.rule for f in found}
    assert "cpu-int8-inputs" not in {
        f.rule for f in preflight(CONFIGS["W4A16"], SHAPES, SHAPES | DENSE, MODEL, "sglang")
    }


def test_command(tmp_path: Path) -> None:
    folder = str(Folder("W8A16").save(tmp_path / "model"))
    runner = CliRunner()
    assert runner.invoke(app, ["verify", folder, "--engine", "vllm"]).exit_code == 0
    asked = runner.invoke(app, ["verify", folder, "--engine", "vllm", "--hardware", "cpu", "--json"])
    assert asked.exit_code == 1
    assert json.loads(asked.stdout)["verdict"] == "refused"
    assert runner.invoke(app, ["verify", folder, "--engine", "vllm", "--hardware", "h100"]).exit_code == 0
    assert runner.invoke(app, ["verify", folder, "--hardware", "abacus"]).exit_code == 2
