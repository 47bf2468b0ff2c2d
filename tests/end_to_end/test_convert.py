"""Folders from format to format and back: the same codes and scales, or one clear refusal and nothing left behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardWriter, TensorLayout
from quantkit.conversion import Change, carry, convert
from quantkit.errors import UserError
from quantkit.formats import FORMATS, gptq
from quantkit.formats.quantized_folder import QuantizedFolder
from quantkit.report.conversion_record import RoundedScales
from quantkit.types import PRESETS, KVSpec, QuantizedWeight, Scheme, TensorSpec
from tests.formats.test_formats import INT4, INT4_ASYM, TOKEN, assert_same, make

MODULES = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
SHAPE = (64, 128)
KV = KVSpec(8, "float")
Edit = Callable[[str, QuantizedWeight], QuantizedWeight]


def write(
    folder: Path,
    name: str,
    schemes: Scheme | dict[str, Scheme],
    *,
    dtype: torch.dtype | None = None,
    change: Edit = lambda module, q: q,
    kv: KVSpec | None = None,
    extra: dict[str, Tensor] | None = None,
) -> dict[str, QuantizedWeight]:
    """A folder in format `name` with embeddings, a norm, a dense head, a bias and one dense projection."""
    form = FORMATS[name]
    schemes = schemes if isinstance(schemes, dict) else dict.fromkeys(MODULES, schemes)
    weights, units = {}, dict[str, dict[str, Tensor]]()
    for seed, (module, scheme) in enumerate(schemes.items()):
        stored = dtype or form.scale_dtype(scheme, torch.bfloat16)
        weights[module] = change(module, make(*SHAPE, scheme, stored, seed))
        units[module] = {f"{module}.{k}": t.clone() for k, t in form.pack(weights[module], scheme).items()}
    units[MODULES[0]][f"{MODULES[0]}.bias"] = torch.randn(64).bfloat16()
    plain = {"model.embed_tokens": (96, 128), "lm_head": (96, 128), "model.norm": (128,)}
    plain["model.layers.1.mlp.gate"] = (8, 128)
    for module, shape in plain.items():
        units[module] = {f"{module}.weight": torch.randn(shape).bfloat16()}
    if kv is not None:
        attention = "model.layers.0.self_attn"
        units["kv"] = {f"{attention}.{leaf}": torch.tensor([0.25]) for leaf in form.KV_NAMES}
    units["extra"] = extra or {}
    layouts = [[TensorLayout(n, t.dtype, tuple(t.shape)) for n, t in unit.items()] for unit in units.values() if unit]
    writer = ShardWriter(folder, layouts, 30_000)  # several shards
    for unit in units.values():
        for tensor_name, tensor in unit.items():
            writer.write(tensor_name, tensor)
    writer.finish()
    settings = form.config(schemes, ["lm_head", "model.layers.1.mlp.gate"], kv)
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for extra_name, content in form.files(settings).items():
        (folder / extra_name).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text("{}")
    return weights


def assert_holds(folder: Path, name: str, weights: dict[str, QuantizedWeight], source: Path) -> None:
    found, form, before = QuantizedFolder.open(folder), FORMATS[name], Checkpoint.open(source)
    assert found.name == name
    assert found.schemes.keys() == weights.keys()
    for module, q in weights.items():
        dtype = form.scale_dtype(found.schemes[module], q.scale_NG.dtype)
        assert_same(found.weight(module), replace(q, scale_NG=q.scale_NG.to(dtype)))
    for tensor in ("model.embed_tokens.weight", "lm_head.weight", f"{MODULES[0]}.bias", "model.norm.weight"):
        assert torch.equal(found.checkpoint.read(tensor), before.read(tensor))
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert {k: v for k, v in found.checkpoint.config.items() if k != "quantization_config"} == {
        k: v for k, v in before.config.items() if k != "quantization_config"
    }
    settings = found.checkpoint.config["quantization_config"]
    files = {path.name for path in folder.iterdir() if path.suffix == ".json"}
    assert files - {"config.json", "tokenizer.json", "quantkit-report.json", "model.safetensors.index.json"} == set(
        form.files(settings)
    )
    assert not folder.with_name(folder.name + ".partial").exists()


W3 = Scheme(TensorSpec(3, 32))
ROUTES = [
    ("compressed-tensors", "awq", INT4),
    ("compressed-tensors", "awq", INT4_ASYM),
    ("compressed-tensors", "gptq", INT4_ASYM),
    ("compressed-tensors", "gptq_v2", Scheme(TensorSpec(8, -1))),
    ("awq", "gptq", INT4_ASYM),
    ("gptq", "compressed-tensors", W3),
    ("gptq", "gptq_v2", INT4_ASYM),
    ("gptq_v2", "awq", INT4),
    ("awq", "awq", INT4),
    ("compressed-tensors", "fp8", PRESETS["FP8_BLOCK"]),
    ("fp8", "compressed-tensors", PRESETS["FP8_BLOCK"]),
    ("compressed-tensors", "fp8_tensor", PRESETS["FP8"]),
    ("fp8_tensor", "modelopt", PRESETS["FP8"]),
    ("modelopt", "compressed-tensors", PRESETS["FP8_DYNAMIC"]),
    ("compressed-tensors", "modelopt", PRESETS["NVFP4A16"]),
    ("modelopt", "compressed-tensors", PRESETS["NVFP4A16"]),
    ("compressed-tensors", "compressed-tensors", PRESETS["MXFP4"]),
]


@pytest.mark.parametrize(("here", "there", "scheme"), ROUTES, ids=str)
def test_same_codes_and_scales(tmp_path: Path, here: str, there: str, scheme: Scheme) -> None:
    weights = write(tmp_path / "in", here, scheme)
    report = convert(tmp_path / "in", tmp_path / "out", there)
    assert_holds(tmp_path / "out", there, weights, tmp_path / "in")
    assert report.to_json() == json.loads((tmp_path / "out/quantkit-report.json").read_text())
    assert (report.source, report.source_format, report.format) == (str(tmp_path / "in"), here, there)
    assert report.schemes == {str(scheme): 4}
    assert report.rounded == RoundedScales(modules=0, scales=0, largest_change=0.0)


def test_dense_linears_are_named(tmp_path: Path) -> None:
    write(tmp_path / "in", "compressed-tensors", INT4)
    convert(tmp_path / "in", tmp_path / "out", "awq")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.gate"]


def test_a_mix_up_of_versions_would_be_seen() -> None:
    class Mixed:
        SIGNED_SCALES, scale_dtype = True, gptq.V1.scale_dtype
        pack, unpack = gptq.V2.pack, gptq.V1.unpack

    q = make(32, 64, INT4_ASYM, torch.float16)
    q = replace(q, zero_NG=torch.full((32, 2), 5, dtype=torch.uint8))
    assert carry(q, INT4_ASYM, gptq.V2)[1] == Change()
    with pytest.raises(UserError, match="zero points would not come back"):
        carry(q, INT4_ASYM, Mixed)


def test_there_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "in", "compressed-tensors", INT4_ASYM, dtype=torch.float16)
    convert(tmp_path / "in", tmp_path / "awq", "awq")
    convert(tmp_path / "awq", tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "out", "compressed-tensors")
    before, after = (Checkpoint.open(tmp_path / name) for name in ("in", "out"))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_negative_scales_go_along(tmp_path: Path) -> None:
    def negative(module: str, q: QuantizedWeight) -> QuantizedWeight:
        return replace(q, scale_NG=-q.scale_NG)

    weights = write(tmp_path / "in", "compressed-tensors", INT4, change=negative)
    convert(tmp_path / "in", tmp_path / "out", "gptq")
    assert_holds(tmp_path / "out", "gptq", weights, tmp_path / "in")


def test_kv_cache_scales_are_renamed(tmp_path: Path) -> None:
    write(tmp_path / "in", "compressed-tensors", PRESETS["FP8"], kv=KV)
    convert(tmp_path / "in", tmp_path / "out", "modelopt")
    found = QuantizedFolder.open(tmp_path / "out")
    assert found.kv == KV
    assert found.checkpoint.read("model.layers.0.self_attn.k_proj.k_scale") == 0.25
    assert (
        json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
    )
    convert(tmp_path / "out", tmp_path / "back", "compressed-tensors")
    before, after = (Checkpoint.open(tmp_path / name) for name in ("in", "back"))
    assert before.tensors.keys() == after.tensors.keys()
    with pytest.raises(UserError, match="KV cache"):
        convert(tmp_path / "in", tmp_path / "no", "fp8_tensor")


def test_mixed_schemes(tmp_path: Path) -> None:
    schemes = {module: INT4 if "attn" in module else INT4_ASYM for module in MODULES}
    weights = write(tmp_path / "in", "compressed-tensors", schemes)
    convert(tmp_path / "in", tmp_path / "out", "gptq_v2")
    assert_holds(tmp_path / "out", "gptq_v2", weights, tmp_path / "in")
    with pytest.raises(UserError, match="awq describes one scheme for all modules"):
        convert(tmp_path / "in", tmp_path / "no", "awq")


def test_groups_of_zeros_have_no_scale_to_keep(tmp_path: Path) -> None:
    def idle(module: str, q: QuantizedWeight) -> QuantizedWeight:
        codes_NK, scale_NG = q.codes_NK.clone(), q.scale_NG.clone()
        codes_NK[3, :32], scale_NG[3, 0] = 8, torch.finfo(torch.bfloat16).tiny  # what the grid gives such a group
        return replace(q, codes_NK=codes_NK, scale_NG=scale_NG)

    write(tmp_path / "in", "compressed-tensors", INT4, change=idle)
    report = convert(tmp_path / "in", tmp_path / "out", "awq")
    assert report.rounded.scales == 0
    q = QuantizedFolder.open(tmp_path / "out").weight(MODULES[0])
    assert q.scale_NG[3, 0] == torch.finfo(torch.float16).tiny
    assert (q.codes_NK[3, :32] == 8).all()


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(folder: Path, there: str, message: str, **options: bool) -> None:
    """Refused with that message, once; the target's parent holds nothing new."""
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(UserError, match=message):
        convert(folder, folder.parent / "out", there, **options)
    assert sorted(path.name for path in folder.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("scheme", "there", "message"),
    [
        (W3, "awq", r"down_proj cannot become awq: .*int3.*; held by: compressed-tensors, gptq, gptq_v2$"),
        (PRESETS["FP8_DYNAMIC"], "fp8", r"held by: compressed-tensors, modelopt$"),
        (PRESETS["MXFP4"], "modelopt", r"held by: compressed-tensors$"),
        (Scheme(PRESETS["FP8_DYNAMIC"].weights), "modelopt", r"fp8 channel; held by: compressed-tensors$"),
        (PRESETS["W8A8"], "gptq", "no quantized inputs"),
    ],
    ids=str,
)
def test_schemes_the_target_lacks(tmp_path: Path, scheme: Scheme, there: str, message: str) -> None:
    write(tmp_path / "in", "compressed-tensors", scheme)
    refused(tmp_path / "in", there, message)
    refused(tmp_path / "in", there, message, requantize=True)


def test_scales_are_rounded_only_when_asked(tmp_path: Path) -> None:
    weights = write(tmp_path / "in", "compressed-tensors", INT4, dtype=torch.float32)
    message = r"down_proj: 256 scales are no numbers of the target.*--requantize.*held exactly by: compressed-tensors$"
    refused(tmp_path / "in", "awq", message)
    report = convert(tmp_path / "in", tmp_path / "out", "awq", requantize=True)
    assert_holds(tmp_path / "out", "awq", weights, tmp_path / "in")  # to the nearest float16
    assert report.rounded.modules == 4
    assert 1000 < report.rounded.scales <= 4 * 256
    assert 2**-13 < report.rounded.largest_change <= 2**-11


@pytest.mark.parametrize("value", [1e-9, 1e6])
def test_scales_out_of_range(tmp_path: Path, value: float) -> None:
    def far(module: str, q: QuantizedWeight) -> QuantizedWeight:
        return replace(q, scale_NG=torch.full_like(q.scale_NG, value))

    write(tmp_path / "in", "compressed-tensors", INT4, change=far)
    for requantize in (False, True):
        refused(tmp_path / "in", "gptq", r"a scale is (0|not a finite).*; held exactly by: comp", requantize=requantize)


def test_zero_point_0_needs_version_2(tmp_path: Path) -> None:
    def zero(module: str, q: QuantizedWeight) -> QuantizedWeight:
        assert q.zero_NG is not None
        return replace(q, zero_NG=q.zero_NG * 0)

    weights = write(tmp_path / "in", "compressed-tensors", INT4_ASYM, change=zero)
    refused(tmp_path / "in", "gptq", r"zero point 0.*held exactly by: compressed-tensors, awq, gptq_v2$")
    convert(tmp_path / "in", tmp_path / "out", "gptq_v2")
    assert_holds(tmp_path / "out", "gptq_v2", weights, tmp_path / "in")


def test_global_scales_without_an_exact_reciprocal(tmp_path: Path) -> None:
    def odd(module: str, q: QuantizedWeight) -> QuantizedWeight:
        whole = 0.1
        return replace(q, scale_NG=q.scale_NG / (q.global_scale or 1.0) * torch.tensor(whole), global_scale=whole)

    write(tmp_path / "in", "modelopt", PRESETS["NVFP4A16"], change=odd)
    refused(tmp_path / "in", "compressed-tensors", "held exactly by: modelopt")
    report = convert(tmp_path / "in", tmp_path / "out", "compressed-tensors", requantize=True)
    assert report.rounded.largest_change < 2**-22


@pytest.mark.parametrize(("here", "scheme"), [("compressed-tensors", INT4), ("gptq", INT4), ("fp8_tensor", TOKEN)])
def test_nan_scales(tmp_path: Path, here: str, scheme: Scheme) -> None:
    write(tmp_path / "in", here, scheme)
    name = f"{MODULES[2]}.{'scales' if here == 'gptq' else 'weight_scale'}"
    poison(tmp_path / "in", name, b"\xff\xff\xff\x7f" if here == "fp8_tensor" else b"\xff\x7f")
    refused(tmp_path / "in", "compressed-tensors", rf"{MODULES[2]}: a scale is NaN or infinite")


def test_nan_weights(tmp_path: Path) -> None:
    write(tmp_path / "in", "fp8", PRESETS["FP8_BLOCK"])
    poison(tmp_path / "in", f"{MODULES[1]}.weight", b"\x7f")
    refused(tmp_path / "in", "compressed-tensors", rf"{MODULES[1]}: a weight is NaN")


def poison(folder: Path, name: str, raw: bytes) -> None:
    """Overwrite the first bytes of a tensor."""
    info = Checkpoint.open(folder).info(name)
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(raw)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "in", "awq", INT4, extra={f"{MODULES[0]}.pre_scale": torch.ones(3)})
    refused(tmp_path / "in", "gptq", r"q_proj\.pre_scale: unknown tensor for awq")

    def edit(**changes: Any) -> None:
        path = tmp_path / "in/config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))

    edit(version="gemv")
    refused(tmp_path / "in", "gptq", "gemv")
    edit(version="gemm", modules_to_not_convert=["down_proj"])
    refused(tmp_path / "in", "gptq", r"down_proj is packed, but quantization_config does not target it")
    edit(quant_method="exl3")
    refused(
        tmp_path / "in", "gptq", r"quantized by 'exl3', which quantkit does not read; it reads compressed-tensors, awq"
    )
    (tmp_path / "in/config.json").write_text("{}")
    refused(tmp_path / "in", "gptq", "nothing describes its codes and scales")


def test_group_size_the_tensors_do_not_have(tmp_path: Path) -> None:
    write(tmp_path / "in", "gptq", INT4)
    path = tmp_path / "in/config.json"
    path.write_text(path.read_text().replace('"group_size": 32', '"group_size": 64'))
    refused(tmp_path / "in", "awq", r"contradict each other: group_size is 64 and 32")
    (tmp_path / "in/quantize_config.json").unlink()
    refused(tmp_path / "in", "awq", r"down_proj: qzeros is .*\[4, 8\], expected .*\[2, 8\]")


def test_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path / "in", "gptq", INT4)
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(tmp_path / "in", "awq", "the header promises")


def test_older_configuration_files_are_read(tmp_path: Path) -> None:
    for here, scheme in (("gptq_v2", INT4_ASYM), ("modelopt", PRESETS["NVFP4A16"])):
        weights = write(tmp_path / here, here, scheme)
        (tmp_path / here / "config.json").write_text(json.dumps({"vocab_size": 96}))
        convert(tmp_path / here, tmp_path / f"{here}-out", "compressed-tensors")
        assert_holds(tmp_path / f"{here}-out", "compressed-tensors", weights, tmp_path / here)


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "in", "gptq", INT4)
    (tmp_path / "out").mkdir()
    refused(tmp_path / "in", "awq", "never overwritten")
    (tmp_path / "out").rmdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/journal.jsonl").write_text('{"recipe": {}}\n')
    refused(tmp_path / "in", "awq", "unfinished run of something else")
    (tmp_path / "out.partial/journal.jsonl").write_text('{"convert": "elsewhere"}\n')  # a conversion that was killed
    convert(tmp_path / "in", tmp_path / "out", "awq")


def test_killed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write(tmp_path / "in", "gptq", INT4)
    monkeypatch.setattr("quantkit.conversion.copy_side_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
