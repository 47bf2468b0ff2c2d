"""Sweeps as a whole: what runs again and what does not, which models stay, what is refused. Runs are made up."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_eval.search import sweep_run
from quantkit_eval.search.options import SweepOptions, check_options
from quantkit_eval.search.results import read_row
from quantkit_eval.search.runs import fitting
from quantkit_eval.search.sweep_folder import SweepFolder
from quantkit_eval.search.sweep_run import SweepResult
from quantkit_eval.search.tables import render
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit.errors import DiskFullError, UserError
from quantkit.planner.this_machine import Machine
from tests.eval.search.fake_runs import FakePool

pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "tiny-llama"
Run = Callable[..., SweepResult]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, hidden 64, with the bundled model's tokenizer; a text and a base recipe beside it."""
    home = tmp_path_factory.mktemp("sweeps")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home / "model")
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(home / "model")
    (home / "text.txt").write_text((EXAMPLE / "eval.txt").read_text(encoding="utf-8")[:1500])
    (home / "calibration.txt").write_text((EXAMPLE / "calibration.txt").read_text(encoding="utf-8")[:3000])
    (home / "base.yaml").write_text(
        "calibration: {data: calibration.txt, samples: 4, seq_len: 32}\n"
        "weights: {bits: 4, group_size: 32, algorithm: {rtn: {range: minmax}}}\n"
    )
    return home


@pytest.fixture
def home(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "home"))


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a sweep by a pool that makes up its rows; machine: what the planner measures."""
    machine = Machine(2, 1 << 40, 1 << 40, 1e9, 1e9, 1 << 28)

    def sweep(pool: FakePool, *grid: str, machine: Machine = machine, **more: Any) -> SweepResult:
        monkeypatch.setattr(sweep_run, "measure", lambda folder: machine)
        monkeypatch.setattr(sweep_run._Sweep, "_pool", lambda self, slots: replace_slots(pool, slots))
        monkeypatch.setattr(sweep_run, "write_plot", lambda points, path, title: None)  # it takes a second
        return sweep_run.sweep(check_options(options(home, *grid, **more)))

    return sweep


def replace_slots(pool: FakePool, slots: int) -> FakePool:
    pool.slots = slots
    return pool


def options(home: Path, *grid: str, **more: Any) -> SweepOptions:
    given: dict[str, Any] = {"text": str(home / "text.txt"), "context": 32, "progress": "off", "output": home / "out"}
    return SweepOptions(model=str(home / "model"), recipe=str(home / "base.yaml"), grid=grid, **given | more)


GRID = ("weights.bits=3,4", "weights.group_size=32,64")


def labels(pool: FakePool) -> list[str]:
    return [job.label.replace("weights.", "") for job in pool.started]


def test_a_row_for_each_combination_and_nothing_is_run_twice(run: Run, home: Path) -> None:
    pd = pytest.importorskip("pandas")
    pool = FakePool()
    result = run(pool, *GRID)
    assert labels(pool) == [f"bits={bits} group_size={size}" for bits in (3, 4) for size in (32, 64)]
    table = pd.read_parquet(home / "out" / "results.parquet")
    assert table.shape[0] == 4
    assert table["weights.bits"].tolist() == [3, 3, 4, 4]
    assert table["model"].tolist() == [str(home / "model")] * 4
    assert sorted(path.name for path in (home / "out").iterdir() if path.name[0] != ".") == [
        "results.csv", "results.parquet", "rows", "sweep.json",
    ]  # fmt: skip
    again = FakePool()
    assert run(again, *GRID).to_json()["rows"] == result.to_json()["rows"]
    assert labels(again) == []
    wider = FakePool()
    run(wider, "weights.bits=3,8", GRID[1])
    assert labels(wider) == ["bits=8 group_size=32", "bits=8 group_size=64"]


def test_an_interrupted_sweep_goes_on(run: Run, home: Path) -> None:
    pd = pytest.importorskip("pandas")
    with pytest.raises(KeyboardInterrupt):
        run(FakePool(die_after=3), *GRID)
    assert pd.read_parquet(home / "out" / "results.parquet").shape[0] == 3
    torn = next((home / "out" / "rows").iterdir())
    torn.write_text(torn.read_text()[:100])  # as no kill leaves it, but a full disk may
    (home / "out" / "rows" / f".{torn.name}.77").write_text("{")
    pool = FakePool()
    assert len(run(pool, *GRID).entries) == 4
    assert len(pool.started) == 2


def test_a_killed_sweep_that_had_made_nothing_but_its_lock(run: Run, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / ".lock").touch()
    (home / "out" / ".sweep.json").write_text("{")
    assert len(run(FakePool(), *GRID).entries) == 4


def test_what_has_changed_is_run_anew(run: Run, home: Path) -> None:
    run(FakePool(), *GRID)

    def started(*grid: str, **more: Any) -> int:
        pool = FakePool()
        run(pool, *grid or GRID, **more)
        return len(pool.started)

    assert started() == 0
    (home / "text.txt").write_text((home / "text.txt").read_text() + "a changed text")
    assert started() == 4
    assert started() == 0
    (home / "calibration.txt").write_text((home / "calibration.txt").read_text() + "a changed text")
    assert started() == 4
    config = home / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-5}))
    assert started() == 4
    tokenizer = home / "model" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert started() == 4
    base = home / "base.yaml"
    base.write_text(base.read_text().replace("bits: 4", "bits: 8"))  # which the grid replaces anyway
    assert started() == 0
    base.write_text(base.read_text().replace("samples: 4", "samples: 5"))
    assert started() == 4
    assert started("weights.bits=4,5", GRID[1]) == 2
    assert started(tokens=64) == 4
    weights = next((home / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100_001] ^= 1
    weights.write_bytes(content)
    assert started() == 4


def test_where_files_lie_does_not_matter(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(FakePool(), *GRID)
    for name in ("model", "text.txt", "calibration.txt"):
        (home / name).rename(home / f"moved-{name}")
    base = home / "base.yaml"
    base.write_text(base.read_text().replace("calibration.txt", "moved-calibration.txt"))
    base.rename(home / "base2.yaml")
    pool = FakePool()
    monkeypatch.chdir(home)
    moved = SweepOptions(
        model="moved-model", recipe="base2.yaml", grid=GRID, output=Path("out"), text="moved-text.txt", context=32,
        progress="off",
    )  # fmt: skip
    monkeypatch.setattr(sweep_run._Sweep, "_pool", lambda self, slots: pool)
    assert len(sweep_run.sweep(check_options(moved)).entries) == 4
    assert not pool.started


def test_failed_runs_are_listed_and_tried_again(run: Run, home: Path) -> None:
    pd = pytest.importorskip("pandas")
    result = run(FakePool(fail=("weights.bits=4 weights.group_size=32",)), *GRID)
    assert [entry.error for entry in result.entries] == [None, None, "it broke", None]
    table = pd.read_parquet(home / "out" / "results.parquet")
    assert table["error"].tolist()[2] == "it broke"
    assert table["size_bytes"].isna().sum() == 1
    pool = FakePool()
    assert not run(pool, *GRID).failed
    assert labels(pool) == ["bits=4 group_size=32"]


@pytest.mark.parametrize(("keep", "kept"), [("none", 0), ("best", 1), ("pareto", 3), ("all", 4)])
def test_which_models_stay(run: Run, home: Path, keep: str, kept: int) -> None:
    """Of (3000, 3100, 4000, 4100 bytes), made so that the second is dominated by nothing, the third by the second."""
    result = run(FakePool(), "weights.bits=3,4", "weights.group_size=32,64", keep=keep)
    models = sorted(path.name for path in (home / "out" / "models").iterdir()) if kept else []
    assert len(models) == {"none": 0, "best": 1, "pareto": len(result.front), "all": 4}[keep]
    assert not (home / "out" / "work").exists()
    folders = {entry.folder for entry in result.entries if entry.folder}
    assert folders == {f"models/{name}" for name in models}
    for entry in result.entries:
        if entry.folder is not None:
            assert entry.row is not None
            assert json.loads((home / "out" / entry.folder / "recipe.json").read_text()) == entry.row.recipe
    if keep == "best":
        assert result.best is not None
        assert folders == {result.best.folder}


def test_models_that_are_asked_for_later_are_made_again(run: Run, home: Path) -> None:
    run(FakePool(), *GRID)
    pool = FakePool()
    result = run(pool, *GRID, keep="best")
    assert len(pool.started) == 1
    assert result.best is not None
    assert result.best.folder is not None
    pool = FakePool()
    run(pool, *GRID, keep="all")
    assert len(pool.started) == 3
    run(FakePool(), *GRID)
    assert len(list((home / "out" / "models").iterdir())) == 4  # what was kept is never removed


def test_another_sweeps_folder(run: Run, home: Path) -> None:
    run(FakePool(), *GRID)
    other = home / "other"
    shutil.copytree(home / "model", other)
    config = other / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-4}))
    before = (home / "out" / "results.csv").read_bytes()
    with pytest.raises(UserError, match=f"holds another sweep, of {home / 'model'}"):
        sweep_run.sweep(check_options(replace(options(home, *GRID), model=str(other))))
    assert (home / "out" / "results.csv").read_bytes() == before


def test_a_folder_with_something_else(run: Run, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no sweep.json"):
        run(FakePool(), *GRID)
    with pytest.raises(UserError, match="only read"):
        run(FakePool(), *GRID, output=home / "model" / "out")
    assert (home / "out" / "thesis.tex").read_text() == "years of work"


def test_two_sweeps_in_one_folder(run: Run, home: Path) -> None:
    run(FakePool(), *GRID)
    place = SweepFolder(home / "out")
    place.begin(str(home / "model"), "", "grid")
    with pytest.raises(UserError, match="a sweep is running in it"):
        run(FakePool(), *GRID)
    place.end()
    assert len(run(FakePool(), *GRID).entries) == 4


def test_no_room_is_known_before_anything_is_made(run: Run, home: Path) -> None:
    small = Machine(2, 1 << 40, 1_200_000, 1e9, 1e9, 1 << 28)
    pool = FakePool()
    with pytest.raises(DiskFullError, match=r"no room for the sweep's folders: 4 runs need .* with --keep all"):
        run(pool, *GRID, keep="all", machine=small)
    assert not pool.started
    assert not (home / "out").exists()


def test_memory_decides_what_is_possible_and_how_many_run_at_a_time(run: Run, home: Path) -> None:
    with pytest.raises(UserError, match="GB of memory"):
        run(FakePool(), *GRID, machine=Machine(2, 1 << 20, 1 << 40, 1e9, 1e9, 1 << 28))
    pool = FakePool()
    run(pool, *GRID, jobs=3, machine=Machine(2, 3 << 30, 1 << 40, 1e9, 1e9, 1 << 28))
    assert pool.slots == 2
    assert fitting(4, [3, 3, 2, 2], 8) == 3
    assert fitting(4, [3, 3], 100) == 2
    assert fitting(2, [9], 8) == 1


def test_impossible_ones_are_told_and_left_out(run: Run, home: Path) -> None:
    pool = FakePool()
    result = run(pool, "weights.bits=4", "weights.group_size=32,48,tensor,-1,channel")
    assert labels(pool) == ["bits=4 group_size=32", "bits=4 group_size=-1"]
    reasons = {one.settings["weights.group_size"]: one.reason for one in result.impossible}
    assert "does not divide" in reasons["48"]
    assert "8 bits" in reasons["tensor"]
    assert result.folded == 1
    with pytest.raises(UserError, match=r"no combination of the grid is possible:\n  weights.group_size=48: "):
        run(FakePool(), "weights.group_size=48", output=home / "none")
    assert not (home / "none").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keep": "some"}, "--keep"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"search": 0}, "--search is 0"),
        ({"limit": 3}, "no --tasks"),
        ({"text": "nowhere.txt"}, "no such text file"),
        ({"context": 4096}, "longer than the 128 positions"),
        ({"context": 128, "tokens": 128}, "two windows"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"ray": "127.0.0.1:1"}, "no Ray answers there"),
        ({"ray": "127.0.0.1"}, "HOST:PORT"),
        ({"recipe": "gptq-w4a61"}, "did you mean `gptq-w4a16`"),
    ],
)
def test_bad_options(home: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(replace(options(home, *GRID), **more))
    assert not (home / "out").exists()


def test_an_empty_grid(home: Path) -> None:
    with pytest.raises(UserError, match="the grid is empty"):
        check_options(options(home))


def test_a_text_that_is_too_short_is_known_before_any_run(run: Run, home: Path) -> None:
    (home / "text.txt").write_text("short")
    with pytest.raises(UserError, match="text"):
        run(FakePool(), *GRID)
    assert not (home / "out").exists()


@pytest.mark.parametrize(("package", "more"), [("pyarrow", {}), ("optuna", {"search": 3}), ("ray", {"ray": "local"})])
def test_an_absent_package_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, package: str, more: dict[str, Any]
) -> None:
    from quantkit_eval.search import options as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else True)
    extra = "ray" if package == "ray" else "sweep"
    with pytest.raises(UserError, match=rf"needs {package}, which is not installed\nhint: .*quantkit\[{extra}\]"):
        check_options(options(home, *GRID, **more))


def test_a_run_of_the_real_worker(home: Path) -> None:
    """One process: quantized, evaluated, its row and its model there."""
    result = sweep_run.sweep(check_options(options(home, "weights.bits=3", keep="all")))
    (entry,) = result.entries
    assert entry.error is None
    assert entry.row is not None
    row = read_row(home / "out" / "rows" / f"{entry.row.name}.json")
    assert row == entry.row
    assert row.kl.low <= row.kl.value <= row.kl.high
    assert row.kl.value > 0
    assert row.tokens_per_second > 0
    assert 3 < row.bits_per_weight <= 4
    assert not row.resumed
    assert row.text_tokens % 31 == 0
    assert (home / "out" / str(entry.folder) / "quantkit-report.json").is_file()
    assert (home / "out" / "front.svg").is_file()


def test_the_tables_fit_a_narrow_screen(run: Run, home: Path) -> None:
    text = StringIO()
    render(run(FakePool(), *GRID), Console(file=text, width=80))
    shown = text.getvalue()
    assert "bits=3 group_size=32" in shown
    assert "Pareto front" in shown
    assert "best: weights.bits=4 weights.group_size=32" in shown
    assert "…" not in shown
