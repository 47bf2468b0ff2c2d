"""The command, from its options to JSON, tables, picture and trace."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from quantkit_eval.bench.benchmark import busy_note, compared_to
from quantkit_eval.bench.llama_bench import llama_bench, parse
from quantkit_eval.bench.options import scenarios
from quantkit_eval.bench.plot import svg
from quantkit_eval.bench.profiling import OTHER, OUTSIDE, by_kind, kind_of
from quantkit_eval.bench.results import Sample
from quantkit_eval.bench.statistics import Latencies
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.errors import RunError

MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"
SMALL = ("--requests", "5", "--input", "8:24", "--output", "4:6", "--dtype", "float32", "--quiet")


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", str(MODEL), *arguments])


def test_json_is_alone_on_stdout_and_has_all_of_it(tmp_path: Path) -> None:
    names = f"generate,batched,generate_batch,{MODEL}"
    files = ("--plot", str(tmp_path / "p.svg"), "--profile", str(tmp_path / "trace.json"))
    result = bench(*SMALL, "--baseline", names, "--shared-prefix", "4", "--json", "-", *files)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (scenario,) = found["scenarios"]
    assert scenario["scenario"]["requests"] == 5
    assert len(scenario["samples"]) == 5  # A B A C A D A E A
    assert [each["name"] for each in scenario["baselines"]] == names.split(",")
    for at, each in enumerate(scenario["baselines"]):
        assert each["same"] == 5, each["name"]
        around = [scenario["samples"][index]["tokens_per_second"] for index in (at, at + 1)]
        assert each["processor_ratio"] > 0
        assert each["speedup"] == pytest.approx(sum(around) / 2 / each["sample"]["tokens_per_second"])
    assert scenario["latencies"]["e2e"]["count"] == 25
    for metric in ("ttft", "tpot", "itl", "e2e"):
        spread = scenario["latencies"][metric]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p95"] <= spread["p99"] <= spread["most"]
    for phase in ("prefill", "decode"):
        assert scenario[phase]["name"] in ("compute", "bandwidth", "host", "operators", "scheduler", "capacity")
    assert scenario["acceptance"] is None
    assert scenario["memory"] > 0 < scenario["blocks"] <= scenario["cache_blocks"]
    assert found["options"]["shared_prefix"] == 4
    assert (found["dtype"], found["kv_cache"], found["device"]) == ("float32", "float32", "cpu")
    assert sum(part["share"] for part in found["profile"]) == pytest.approx(1, abs=0.05)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")


def test_tables_of_a_sweep_with_guesses(tmp_path: Path) -> None:
    arguments = ("--prefill", "16", "--decode", "8", "--sweep-batch", "1,3", "--speculate", "ngram", "--kv", "int8")
    result = bench(*arguments, "--quiet", "--dtype", "float32", "--json", str(tmp_path / "b.json"))
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for text in ("1 request, 16 tokens in, 8 out", "3 requests", "TTFT engine", "limited by", "guesses right"):
        assert text in shown, text
    found = json.loads((tmp_path / "b.json").read_text())
    assert [len(each["samples"][0]["requests"]) for each in found["scenarios"]] == [1, 3]
    assert all(each["drafted"] > 0 for each in found["scenarios"])
    assert "int8" in found["kv_cache"]


def test_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    for option in ("--json", "--plot", "--profile"):
        for path, words in ((tmp_path / "there", "never overwritten"), (tmp_path / "no/x", "folder does not exist")):
            result = bench(*SMALL, option, str(path))
            assert result.exit_code == 2
            assert option in result.stderr
            assert words in result.stderr
    assert (tmp_path / "there").read_text() == "mine"


def test_llama_bench(tmp_path: Path) -> None:
    """With programs that stand in for llama.cpp's."""
    rows = [
        {"n_prompt": 16, "n_gen": 0, "avg_ts": 100.5, "model_type": "llama ?B F32", "model_size": 123},
        {"n_prompt": 0, "n_gen": 6, "avg_ts": 50.0, "model_type": "llama ?B F32", "model_size": 123},
    ]
    seen = tmp_path / "seen"
    (tmp_path / "llama-bench").write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(seen)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"assert open(sys.argv[2], 'rb').read(4) == b'GGUF'\nprint({json.dumps(rows)!r})\n"
    )
    (tmp_path / "llama-quantize").write_text(
        f"#!{sys.executable}\nimport shutil, sys\nshutil.copy(sys.argv[1], sys.argv[2])\n"
    )
    for name in ("llama-bench", "llama-quantize"):
        (tmp_path / name).chmod(0o755)
    found = llama_bench(tmp_path, str(MODEL), scenarios(1024, input="8:24", output="6"))
    assert len(found) == 3
    assert (found[0].name, found[0].bytes, found[0].prompt, found[0].decode) == ("llama ?B F32", 123, 100.5, 50.0)
    lines = seen.read_text().splitlines()
    assert [Path(line.split()[1]).name for line in lines] == ["converted.gguf", "Q8_0.gguf", "Q4_0.gguf"]
    assert all("-p 16 -n 6" in line for line in lines)
    (tmp_path / "llama-bench").write_text("#!/bin/sh\necho broken model >&2\nexit 3\n")
    with pytest.raises(RunError, match="llama-bench ended with code 3:\nbroken model"):
        llama_bench(tmp_path, str(MODEL), scenarios(1024))
    crash = f"#!{sys.executable}\nimport os, sys\nif '--repack' not in sys.argv: os.kill(os.getpid(), 4)\n"
    (tmp_path / "llama-bench").write_text(f"{crash}print({json.dumps(rows)!r})\n")
    again = llama_bench(tmp_path, str(MODEL), scenarios(1024))[0]
    assert (again.name, again.decode) == ("llama ?B F32, --repack 0: it crashes without", 50.0)
    with pytest.raises(RunError, match="printed no figures"):
        parse("[]")


def test_what_other_programs_take_does_not_count() -> None:
    """The engine at 10 and 30 tokens a second around a baseline at 4; in 2 s of the processor each, and 5 s."""
    latencies = Latencies.of([])
    around = [Sample(10.0, 4.0, 2.0, ()), Sample(30.0, 4.0, 2.0, ())]
    found = compared_to("other", Sample(4.0, 9.0, 5.0, ()), around, 3, latencies)
    assert (found.speedup, found.processor_ratio, found.same) == (5.0, 2.5, 3)
    assert busy_note([Sample(1.0, 4.0, 3.9, ())]) == []
    assert "a processor 50% of the time" in busy_note(around)[0]


def test_kinds_of_work() -> None:
    kinds = {
        "aten::addmm": "products", "aten::scaled_dot_product_attention": "attention", "aten::_softmax": "attention",
        "aten::index_copy_": "cache and copies", "aten::mul": "elementwise", "aten::argmax": "choice of tokens",
        "aten::view": OTHER, "quantkit::linear": "products",
    }  # fmt: skip
    for name, kind in kinds.items():
        assert kind_of(name) == kind, name
    found = by_kind([("aten::mm", 2.0), ("aten::addmm", 1.0), ("aten::mul", 0.5)], 4.0)
    assert [(part.kind, part.seconds, part.share) for part in found] == [
        ("products", 3.0, 0.75), ("elementwise", 0.5, 0.125), (OUTSIDE, 0.5, 0.125),
    ]  # fmt: skip


def test_a_picture_is_sound_where_all_points_are_one() -> None:
    for lines in ({"a <b>": [(1.0, 0.0)]}, {"a": [(1.0, 2.0), (8.0, 3.0)], "b": [(0.001, 1.0)]}):
        assert ElementTree.fromstring(svg("t & u", "x", "y", lines)).tag.endswith("svg")
