"""gguf.imatrix: what is rounded is weighed with the file's importance; what is wrong with the file is one message."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.algorithms.rtn import round_to_type
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.block_bytes import pack
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from quantkit.formats.gguf.tensor_names import gguf_shapes, places, row_order
from tests.end_to_end.test_gguf import run, tiny
from tests.killed_run import killed_at

RTN: dict[str, Any] = {"gguf": {"mix": "q4_k_m"}, "calibration": None}
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: Path) -> Shapes:
    """Shapes of the tensors of the model's GGUF, rows first."""
    checkpoint = Checkpoint.open(model)
    return gguf_shapes(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})


def matrix(shapes: Shapes, seed: int = 0, unreached: int | None = None) -> Imatrix:
    """An entry for each linear, and the head, in which columns differ a lot; `unreached`: an expert without tokens."""
    rng, entries = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if len(shape) == 1 or "norm" in name or "gate_inp" in name:
            continue
        M = shape[0] if len(shape) == 3 else 1
        counts = np.full(M, 50, np.float32)
        sums = np.exp(3 * rng.standard_normal((M, shape[-1]))).astype(np.float32)
        if unreached is not None and M > 1:
            counts[unreached] = sums[unreached] = 0
        entries[name] = ImatrixEntry(sums, counts)
    return Imatrix(entries, ("a text",), 3, 32)


def written(path: Path, given: Imatrix) -> str:
    write_imatrix(path, given)
    return str(path)


def with_file(recipe: dict[str, Any], file: str) -> dict[str, Any]:
    return recipe | {"gguf": recipe["gguf"] | {"imatrix": file}}


def blocks(output: Path) -> dict[str, np.ndarray]:
    """The bytes of every tensor of model.gguf, uint8 [rows, bytes]; of experts [E, rows, bytes]."""
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(output / "model.gguf").tensors}


def types(output: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(output / "model.gguf").tensors}


def quantize(model: Path, output: Path, recipe: dict[str, Any]) -> quantkit.Report:
    return quantkit.quantize(model, recipe, output, device="cpu", progress=False)


@pytest.mark.parametrize(("variant", "suffix"), [("llama", ".gguf"), ("llama-tied", ".dat"), ("qwen3_moe", ".gguf")])
def test_every_rounded_weight_is_weighed_with_its_entry(
    variant: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(variant, tmp_path / "model", monkeypatch)
    shapes = shapes_of(model)
    given = matrix(shapes)
    report = quantize(model, tmp_path / "out", with_file(RTN, written(tmp_path / f"m{suffix}", given)))
    assert report.calibration is None
    found, kinds, state = blocks(tmp_path / "out"), types(tmp_path / "out"), load_file(model / "model.safetensors")
    where = places(Checkpoint.open(model).config, {name: tuple(w.shape) for name, w in state.items()})
    compared = 0
    for name, place in where.items():
        if place.tensor not in given.entries:
            continue
        e_MK = torch.from_numpy(given.entries[place.tensor].importance())
        weight = state[name].float()
        weight = weight if place.heads is None else weight[torch.from_numpy(row_order(len(weight), place.heads))]
        stored = found[place.tensor] if place.expert is None else found[place.tensor][place.expert]
        expected = pack(round_to_type(weight, kinds[place.tensor], e_MK[place.expert or 0]))
        np.testing.assert_array_equal(stored, expected.numpy(), err_msg=name)
        compared += 1
        if kinds[place.tensor] != "Q8_0":  # which llama.cpp rounds without importance, and so do we
            assert not np.array_equal(stored, pack(round_to_type(weight, kinds[place.tensor])).numpy()), name
    assert compared >= 15


def test_the_file_says_which_matrix_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    given = matrix(shapes_of(model))
    quantize(model, tmp_path / "out", with_file(RTN, written(tmp_path / "m.gguf", given)))
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "m.gguf"  # no folder of the machine it was made on
    assert fields["quantize.imatrix.dataset"].contents() == "a text"
    assert fields["quantize.imatrix.entries_count"].contents() == len(given.entries)
    assert fields["quantize.imatrix.chunks_count"].contents() == 3
    assert str(tmp_path) not in fields["quantkit.recipe"].contents()


def test_goes_before_calibration_text_where_something_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same matrix, rounding does not depend on the text at all; GPTQ does not depend on the matrix."""
    model = tiny("llama-tied", tmp_path / "model", monkeypatch)
    file = written(tmp_path / "m.gguf", matrix(shapes_of(model)))
    quantize(model, tmp_path / "none", with_file(RTN, file))
    run(model, tmp_path / "text", with_file({"gguf": {"mix": "q4_k_m"}}, file))
    none, text = blocks(tmp_path / "none"), blocks(tmp_path / "text")
    assert all(np.array_equal(none[name], text[name]) for name in none)
    mixed = {"gguf": {"mix": "q4_k_m"}, "overrides": [{"match": "re:.*mlp.*", "weights": {"algorithm": "gptq"}}]}
    run(model, tmp_path / "mixed", with_file(mixed, file))
    both = blocks(tmp_path / "mixed")
    same = {name for name in both if np.array_equal(both[name], text[name])}
    assert {name for name in both if "ffn" in name and "norm" not in name}.isdisjoint(same)
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_v.weight"} <= same


def test_experts_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file: all columns alike, and a line of the report. Of GPTQ's calibration: by the file."""
    model = tiny("qwen3_moe", tmp_path / "model", monkeypatch)
    shapes = shapes_of(model)
    file = written(tmp_path / "m.gguf", matrix(shapes, unreached=2))
    report = quantize(model, tmp_path / "out", with_file(RTN, file))
    tensors = sum(len(shape) == 3 for shape in shapes.values())
    assert any(f"no token reached {tensors} experts in {tensors} tensors" in line for line in report.warnings)
    plain = {"gguf": {"mix": "q4_0"}, "weights": {"algorithm": "gptq"}, "calibration": {"samples": 1, "seq_len": 8}}
    recipe = with_file(plain, file)
    one = torch.full((2, 8), 5)  # hardly any expert gets a token
    reports = [run(model, tmp_path / name, settings, one) for name, settings in (
        ("with", recipe), ("without", plain))]  # fmt: skip
    notes = [{record.name: record.note for record in report.linears if record.note} for report in reports]
    assert notes[0].keys() == notes[1].keys()
    assert all("rounded by the importance matrix" in note for note in notes[0].values())
    differing = [
        n for n, data in blocks(tmp_path / "with").items() if not np.array_equal(data, blocks(tmp_path / "without")[n])
    ]
    assert any("exps" in name for name in differing)


def test_a_head_without_entry_is_rounded_as_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    shapes = shapes_of(model)
    linears = {name: shape for name, shape in shapes.items() if name.startswith("blk.")}  # as llama-imatrix writes it
    file = written(tmp_path / "m.gguf", matrix(linears))
    report = run(model, tmp_path / "out", with_file({"gguf": {"mix": "q4_k_m"}}, file))
    run(model, tmp_path / "plain", {"gguf": {"mix": "q4_k_m"}})
    assert any("no entry for the head (output.weight)" in line for line in report.warnings)
    with_, without = blocks(tmp_path / "out"), blocks(tmp_path / "plain")
    assert np.array_equal(with_["output.weight"], without["output.weight"])
    assert not np.array_equal(with_["blk.0.attn_q.weight"], without["blk.0.attn_q.weight"])


def ask(verb: str, model: Path, output: Path, recipe: dict[str, Any]) -> None:
    if verb == "plan":
        quantkit.plan(model, recipe)
    elif recipe["calibration"] is None:
        quantize(model, output, recipe)
    else:
        run(model, output, recipe | {"calibration": {}})


def test_beside_gptq_it_weighs_the_head_and_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    recipe = {"gguf": {"mix": "q4_k_m", "output": "q5_0"}, "weights": {"algorithm": "gptq"}}
    report = run(model, tmp_path / "out", with_file(recipe, written(tmp_path / "m.gguf", matrix(shapes_of(model)))))
    run(model, tmp_path / "plain", recipe)
    assert any("m.gguf: weighs the embedding and the head alone" in line for line in report.warnings)
    with_, without = blocks(tmp_path / "out"), blocks(tmp_path / "plain")
    assert not np.array_equal(with_["output.weight"], without["output.weight"])


def mistakes(folder: Path, shapes: Shapes) -> dict[str, tuple[str, str]]:
    """Name -> (file of gguf.imatrix, what the message says)."""
    good = matrix(shapes)
    (folder / "text.gguf").write_text("no matrix at all")
    (folder / "empty.gguf").write_bytes(b"")
    lacking = {name: entry for name, entry in good.entries.items() if "attn_q" not in name}
    wide = {name: ImatrixEntry(np.repeat(e.sums, 2, 1), e.counts) for name, e in good.entries.items()}
    other = {f"blk.{i}.ssm_in.weight": entry for i, entry in enumerate(good.entries.values())}
    return {
        "missing": (str(folder / "nope.gguf"), "nope.gguf: No such file"),
        "folder": (str(folder), "Is a directory"),
        "text": (str(folder / "text.gguf"), "not an importance matrix"),
        "empty": (str(folder / "empty.gguf"), "not an importance matrix"),
        "lacking": (written(folder / "lacking.gguf", Imatrix(lacking)), "no entry for blk.0.attn_q.weight"),
        "width": (written(folder / "wide.gguf", Imatrix(wide)), "values, the tensor"),
        "other": (written(folder / "other.gguf", Imatrix(other)), "no entry is for a tensor of this model"),
    }


@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_a_wrong_file_is_one_message_before_any_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    for name, (file, message) in mistakes(tmp_path, shapes_of(model)).items():
        with pytest.raises(quantkit.UserError) as caught:
            ask(verb, model, tmp_path / "out", with_file(RTN, file))
        text = str(caught.value)
        assert text.startswith("gguf.imatrix: "), name
        assert message in text, (name, text)
        assert text.count("\nhint: ") == 1, (name, text)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_entries_that_an_override_asks_for(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix without MLP serves a recipe that rounds no MLP; one that nothing reads is refused."""
    model = tiny("llama", tmp_path / "model", monkeypatch)
    shapes = shapes_of(model)
    attention = {name: shape for name, shape in shapes.items() if ".attn" in name}
    file = written(tmp_path / "m.gguf", matrix(attention))
    rounded = {"overrides": [{"match": "re:.*mlp.*", "weights": {"algorithm": "gptq"}}]}
    whole: dict[str, Any] = {"gguf": {"mix": "q4_k_m"}, "calibration": {}}
    quantkit.plan(model, with_file(whole | rounded, file))
    for recipe, message in (
        (
            whole | {"overrides": [{"match": "re:.*self_attn.*", "weights": {"algorithm": "gptq"}}]},
            "no entry for blk.0.ffn",
        ),
        (whole | {"weights": {"algorithm": "gptq"}}, "nothing would read it"),
    ):
        with pytest.raises(quantkit.UserError, match=message):
            ask(verb, model, tmp_path / "out", with_file(recipe, file))
    assert not list(tmp_path.glob("out*"))


def test_an_unfinished_run_needs_the_same_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path / "model", monkeypatch)
    shapes = shapes_of(model)
    recipe = with_file({"gguf": {"mix": "q4_k_m"}}, written(tmp_path / "m.gguf", matrix(shapes)))
    run(model, tmp_path / "whole", recipe)
    with killed_at(1):
        run(model, tmp_path / "out", recipe)
    kept = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").unlink()
    written(tmp_path / "m.gguf", matrix(shapes, seed=1))
    with pytest.raises(quantkit.UserError, match="imatrix"):
        run(model, tmp_path / "out", recipe)
    (tmp_path / "m.gguf").write_bytes(kept)
    run(model, tmp_path / "out", recipe)
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "whole/model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("section", "transforms", "message"),
    [
        ({"imatrix": "m.gguf"}, ["awq"], "inputs, which awq changes"),
        ({"imatrix": "m.gguf"}, [{"smoothquant": {}}], "inputs, which smoothquant changes"),
        ({"mix": {"bits_per_weight": 4.5}}, ["rotation"], "cannot go with a rotation"),
    ],
)
def test_transforms_change_what_the_section_speaks_of(
    section: dict[str, Any], transforms: list[Any], message: str
) -> None:
    with pytest.raises(quantkit.UserError, match=message):
        quantkit.Recipe(gguf={"mix": "q4_k_m"} | section, transforms=transforms, calibration={})
