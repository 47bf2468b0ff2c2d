"""Folders as GGUF files: the same codes and scales, weights rounded again on request, or one refusal and no file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.checkpoint.gguf_file import open_gguf
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardWriter, TensorLayout
from quantkit.cli.main import app
from quantkit.errors import UserError
from quantkit.formats import FORMATS
from quantkit.formats.gguf.tensor_names import row_order
from quantkit.gguf_conversion.choices import Choices
from quantkit.grids import make_grid
from quantkit.types import PRESETS, ActivationRange, KVSpec, QuantizedWeight, Scheme, TensorSpec
from tests.tiny_models import GQA, tiny_model

TINY_LLAMA = Path(__file__).parents[2] / "examples/tiny-llama"
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 128, 256, 4, 2, 8192
INT4, INT8 = Scheme(TensorSpec(4, 32)), Scheme(TensorSpec(8, 32))
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def quantized(shape: tuple[int, int], scheme: Scheme, seed: int, format_name: str) -> QuantizedWeight:
    torch.manual_seed(seed)
    w_NK = torch.randn(shape) / shape[1] ** 0.5
    dtype = FORMATS[format_name].scale_dtype(scheme, torch.float16 if "gptq" in format_name else torch.bfloat16)
    grid = make_grid(scheme.weights, dtype, None, signed=False).for_tensors([w_NK])
    parameters = grid.fit(w_NK)
    q = grid.weight(grid.encode(w_NK, parameters), parameters)
    if scheme.activations is not None and scheme.activations.calibrated:
        q = replace(q, input=ActivationRange(torch.tensor(2.0**-seed)))
    return q


def write(
    folder: Path,
    scheme: Scheme,
    format_name: str = "compressed-tensors",
    *,
    layers: int = 2,
    tied: bool = True,
    changes: dict[str, QuantizedWeight] | None = None,
) -> dict[str, QuantizedWeight]:
    """A quantized Llama with the tokenizer of the bundled model; returns module -> weight."""
    form, weights = FORMATS[format_name], dict[str, QuantizedWeight]()
    units = [{"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).bfloat16()}]
    units.append({"model.norm.weight": 1 + torch.randn(HIDDEN).bfloat16() / 8})
    if not tied:
        units.append({"lm_head.weight": torch.randn(VOCAB, HIDDEN).bfloat16()})
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            units.append({f"{prefix}.{norm}.weight": 1 + torch.randn(HIDDEN).bfloat16() / 8})
        for seed, (name, shape) in enumerate(SHAPES.items()):
            module = f"{prefix}.{name}"
            weights[module] = (changes or {}).get(module) or quantized(shape, scheme, seed, format_name)
            units.append({f"{module}.{k}": t.clone() for k, t in form.pack(weights[module], scheme).items()})
    layouts = [[TensorLayout(n, t.dtype, tuple(t.shape)) for n, t in unit.items()] for unit in units]
    writer = ShardWriter(folder, layouts, 1 << 30)
    for unit in units:
        for name, tensor in unit.items():
            writer.write(name, tensor)
    writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    settings = form.config(dict.fromkeys(weights, scheme), ["lm_head"], None)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, folder)
    return weights


def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file as the gguf package decodes it, rows first."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        data = tensor.data.view(np.uint8) if tensor.tensor_type.name == "BF16" else tensor.data
        values = gguf.dequantize(data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values, np.float32)).reshape(tensor.shape.tolist()[::-1])
    return found


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def exact(q: QuantizedWeight) -> Tensor:
    """The weight [N, K] in float32."""
    (N, K), G = q.codes_NK.shape, q.scale_NG.shape[1]
    if q.spec.element == "int":
        steps = q.codes_NK.float() - q.spec.levels // 2
    else:
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        steps = values[(q.codes_NK & 7).long()] * (1 - 2 * (q.codes_NK >> 3).float())
    return (steps.reshape(N, G, -1) * q.scale_NG.float()[..., None]).reshape(N, K)


def permuted(name: str, w_NK: Tensor) -> Tensor:
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(name)
    return w_NK if heads is None else w_NK[torch.from_numpy(row_order(len(w_NK), heads))]


CARRIED = [
    ("Q4_0", INT4, "compressed-tensors"),
    ("Q4_0", INT4, "gptq"),
    ("Q8_0", INT8, "compressed-tensors"),
    ("Q8_0", INT8, "gptq"),
    ("MXFP4", PRESETS["MXFP4"], "compressed-tensors"),
    ("NVFP4", PRESETS["NVFP4"], "compressed-tensors"),
    ("NVFP4", PRESETS["NVFP4"], "modelopt"),
    ("NVFP4", PRESETS["NVFP4A16"], "compressed-tensors"),
]


@pytest.mark.parametrize(("type_", "scheme", "format_name"), CARRIED)
def test_every_linear_decodes_to_the_folders_weights(
    tmp_path: Path, type_: str, scheme: Scheme, format_name: str
) -> None:
    source, output = tmp_path / "folder", tmp_path / "model.gguf"
    weights = write(source, scheme, format_name)
    report = quantkit.convert(source, output)
    found, kinds = decoded(output), types(output)
    for module, q in weights.items():
        layer, name = module.split(".")[2], module.split(".", 3)[3]
        tensor = f"blk.{layer}.{NAMES[name]}"
        assert kinds[f"{tensor}.weight"] == type_
        w_NK = found[f"{tensor}.weight"]
        if type_ == "NVFP4":
            w_NK = w_NK * found[f"{tensor}.scale"]
            assert found[f"{tensor}.scale"].tolist() == [q.global_scale]
            assert (f"{tensor}.input_scale" in found) == (q.input is not None)
            if q.input is not None:
                assert torch.equal(found[f"{tensor}.input_scale"], q.input.scale.reshape(1))
        assert torch.equal(w_NK, permuted(name, exact(q))), module
    checkpoint = Checkpoint.open(source)
    assert kinds["token_embd.weight"] == "BF16"  # as stored
    assert torch.equal(found["token_embd.weight"], checkpoint.read("model.embed_tokens.weight").float())
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert torch.equal(found["output_norm.weight"], checkpoint.read("model.norm.weight").float())
    file = open_gguf(output)
    numbers = {"Q4_0": 2, "Q8_0": 7, "MXFP4": 38, "NVFP4": 39}
    assert file.metadata["general.file_type"] == numbers[type_]
    assert file.metadata["general.architecture"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == VOCAB
    assert (report.format, report.modules, report.source_format) == ("gguf", 14, format_name)
    assert report.files.keys() == {"model.gguf"}
    assert report.requantized is None
    assert any("--token-embedding q6_k makes it" in note for note in report.notes)  # more than the linears here
    assert any("llama.cpp rounds them itself" in note for note in report.notes) == (type_ == "MXFP4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.gguf"]


def test_the_same_bytes_twice_and_shards(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4)
    runner = CliRunner()
    for name in ("a.gguf", "b.gguf"):
        result = runner.invoke(app, ["convert", str(tmp_path / "folder"), str(tmp_path / name)])
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    args = ["convert", str(tmp_path / "folder"), str(tmp_path / "s.gguf"), "--max-shard", "100K", "--json"]
    result = runner.invoke(app, args)
    assert result.exit_code == 0, result.stderr
    names = sorted(path.name for path in tmp_path.glob("s*"))
    assert names == sorted(json.loads(result.stdout)["files"])
    assert len(names) > 2
    assert names[0] == f"s-00001-of-{len(names):05}.gguf"
    whole, parts = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / names[0])
    assert list(whole.tensors) == list(parts.tensors)
    for name, tensor in whole.tensors.items():
        other = parts.tensors[name]
        pair = [Path(t.path).read_bytes()[t.start : t.start + t.nbytes] for t in (tensor, other)]
        assert pair[0] == pair[1]
    again = runner.invoke(app, args)
    assert again.exit_code == 2
    assert "s-00001-of-" in again.stderr
    assert "exists and is never overwritten" in again.stderr


@pytest.mark.parametrize(
    ("scheme", "format_name", "words"),
    [
        (Scheme(TensorSpec(4, 128)), "compressed-tensors", "int4 sym g128"),
        (Scheme(TensorSpec(4, -1)), "compressed-tensors", "int4 sym channel"),
        (Scheme(TensorSpec(8, -1)), "compressed-tensors", "int8 sym channel"),
        (Scheme(TensorSpec(4, 64)), "gptq", "int4 sym g64"),
        (Scheme(TensorSpec(4, 32, symmetric=False)), "awq", "int4 asym g32"),
        (PRESETS["FP8_DYNAMIC"], "compressed-tensors", "fp8 channel"),
        (PRESETS["FP8"], "fp8_tensor", "fp8 tensor"),
        (PRESETS["MXFP8"], "compressed-tensors", "mxfp8"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, scheme: Scheme, format_name: str, words: str) -> None:
    write(tmp_path / "folder", scheme, format_name)
    with pytest.raises(UserError, match=f"(?s)model.layers.0.*{words}.*hint: pass --requantize q4_k_m"):
        quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_quantized_cache_has_no_place(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4, layers=1)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    settings = FORMATS["compressed-tensors"].config({"x": INT4}, [], KVSpec(8, "float"))
    config["quantization_config"]["kv_cache_scheme"] = settings["kv_cache_scheme"]
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "folder/model.safetensors")
    state |= {f"model.layers.0.self_attn.{kind}_scale": torch.tensor([0.25]) for kind in "kv"}
    save_file(state, tmp_path / "folder/model.safetensors")
    with pytest.raises(UserError, match=r"(?s)the KV cache is described as fp8 tensor.*hint: pass --requantize"):
        quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf", requantize=True)
    assert open_gguf(tmp_path / "out.gguf").metadata["general.file_type"] == 15


def test_the_file_tells_how_it_was_made(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4, layers=1)
    report = {"recipe": {"model": "/home/me/m", "calibration": {"data": "/x"}, "weights": {"bits": 4}}}
    (tmp_path / "folder/quantkit-report.json").write_text(json.dumps(report | {"calibration": {"samples": 8}}))
    quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    keys = open_gguf(tmp_path / "out.gguf").metadata
    assert json.loads(keys["quantkit.recipe"]) == {"weights": {"bits": 4}}
    assert json.loads(keys["quantkit.calibration"]) == {"samples": 8}


def test_scales_beyond_float16_are_counted(tmp_path: Path) -> None:
    q = quantized((FFN, HIDDEN), INT4, 5, "compressed-tensors")
    scale_NG = q.scale_NG.clone()
    scale_NG[:3, 1] = 1.0e-8
    module = "model.layers.1.mlp.up_proj"
    write(tmp_path / "folder", INT4, changes={module: QuantizedWeight(q.codes_NK, scale_NG, None, q.spec)})
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "folder"), str(tmp_path / "out.gguf")])
    assert result.exit_code == 2
    assert f"{module}.weight: 3 of {FFN * HIDDEN // 32} scales are not exact as float16" in result.stderr
    assert "hint: pass --requantize" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_requantize_rounds_onto_a_mix(tmp_path: Path) -> None:
    source = tmp_path / "folder"
    weights = write(source, PRESETS["FP8_DYNAMIC"])
    runner, wanted = CliRunner(), {"q8_0": ("Q8_0", 7), "Q4_K_M": ("Q5_0", 15), "f16": ("F16", 1)}
    for mix, (type_, number) in wanted.items():
        output = tmp_path / f"{mix}.gguf"
        result = runner.invoke(app, ["convert", str(source), str(output), "--requantize", mix])
        assert result.exit_code == 0, result.stderr
        assert types(output)["blk.0.attn_q.weight"] == type_  # rows of 128: no block of 256
        assert open_gguf(output).metadata["general.file_type"] == number
        q, found = weights["model.layers.0.self_attn.q_proj"], decoded(output)["blk.0.attn_q.weight"]
        fp8 = q.codes_NK.view(torch.float8_e4m3fn).float() * q.scale_NG
        error = (found - permuted("self_attn.q_proj", fp8)).norm() / fp8.norm()
        assert error < {"q8_0": 0.01, "Q4_K_M": 0.06, "f16": 1e-3}[mix]


@pytest.mark.parametrize("order", ["last", "first", "middle"])
def test_requantize_alone_takes_the_mix_of_as_many_bits(tmp_path: Path, order: str) -> None:
    source, output = tmp_path / "folder", tmp_path / "out.gguf"
    write(source, Scheme(TensorSpec(8, -1)))
    args = [str(source), str(output)]
    args.insert({"last": 2, "first": 0, "middle": 1}[order], "--requantize")
    result = CliRunner().invoke(app, ["convert", *args])
    assert result.exit_code == 0, result.stderr
    assert types(output)["blk.0.attn_q.weight"] == "Q8_0"


def test_what_has_its_type_already_is_carried_over(tmp_path: Path) -> None:
    """Rounding again would choose other scales."""
    weights = write(tmp_path / "folder", INT4)
    quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf", requantize="q4_0")
    found = decoded(tmp_path / "out.gguf")["blk.1.attn_v.weight"]
    assert torch.equal(found, exact(weights["model.layers.1.self_attn.v_proj"]))


def test_rounding_onto_the_type_of_the_codes_takes_inexact_scales(tmp_path: Path) -> None:
    q = quantized((FFN, HIDDEN), INT4, 5, "compressed-tensors")
    module, far = "model.layers.0.mlp.up_proj", replace(q, scale_NG=q.scale_NG.clone())
    far.scale_NG[:3, 1] = 1.0e-8
    write(tmp_path / "folder", INT4, layers=1, changes={module: far})
    report = quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf", requantize="q4_0")
    assert report.requantized == "Q4_0"
    found = decoded(tmp_path / "out.gguf")["blk.0.ffn_up.weight"]
    assert (found - exact(far)).norm() < 0.1 * exact(far).norm()


def test_types_of_the_embedding_and_the_head(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4, tied=False)
    output = tmp_path / "out.gguf"
    quantkit.convert(tmp_path / "folder", output, token_embedding="q4_0", output_type="Q8_0")
    assert (types(output)["token_embd.weight"], types(output)["output.weight"]) == ("Q4_0", "Q8_0")
    table = Checkpoint.open(tmp_path / "folder").read("model.embed_tokens.weight").float()
    blocks = gguf.quantize(table.numpy(), gguf.GGMLQuantizationType.Q4_0)
    stored = next(t for t in GGUFReader(output).tensors if t.name == "token_embd.weight")
    np.testing.assert_array_equal(stored.data, blocks)
    assert types(output)["blk.0.attn_q.weight"] == "Q4_0"
    shutil.rmtree(tmp_path / "folder")
    write(tmp_path / "folder", INT4)
    with pytest.raises(UserError, match="the head of this model is the embedding table"):
        quantkit.convert(tmp_path / "folder", tmp_path / "tied.gguf", output_type="q6_k")


@pytest.mark.parametrize(("dtype", "type_"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_a_dense_folder_keeps_its_dtype(tmp_path: Path, dtype: str, type_: str) -> None:
    model = tiny_model("llama").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "folder")
    copy_tokenizer(tmp_path / "folder", 96)
    quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    found, kinds = decoded(tmp_path / "out.gguf"), types(tmp_path / "out.gguf")
    assert kinds["blk.1.ffn_down.weight"] == kinds["output.weight"] == type_
    assert kinds["blk.1.ffn_norm.weight"] == "F32"
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    assert torch.equal(found["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"])
    order = torch.from_numpy(row_order(24, 2))
    assert torch.equal(found["blk.0.attn_k.weight"], state["model.layers.0.self_attn.k_proj.weight"][order])
    assert open_gguf(tmp_path / "out.gguf").metadata["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[type_]


def test_biases_norms_and_experts_of_other_architectures(tmp_path: Path) -> None:
    for name in ("qwen2", "gemma3", "qwen3_moe"):
        model = tiny_model(name)
        model.save_pretrained(tmp_path / name)
        copy_tokenizer(tmp_path / name, 96)
        quantkit.convert(tmp_path / name, tmp_path / f"{name}.gguf")
    state = tiny_model("qwen2").state_dict()
    found = decoded(tmp_path / "qwen2.gguf")
    assert torch.equal(found["blk.0.attn_q.bias"], state["model.layers.0.self_attn.q_proj.bias"])
    state = tiny_model("gemma3").state_dict()
    found = decoded(tmp_path / "gemma3.gguf")
    assert torch.equal(found["blk.1.attn_q_norm.weight"], state["model.layers.1.self_attn.q_norm.weight"] + 1)
    state = tiny_model("qwen3_moe").state_dict()
    found = decoded(tmp_path / "qwen3_moe.gguf")
    both = state["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(torch.cat([found[f"blk.0.ffn_{p}_exps.weight"] for p in ("gate", "up")], 1), both)
    assert types(tmp_path / "qwen3_moe.gguf")["blk.0.ffn_gate_inp.weight"] == "F32"


def test_rows_of_biases_move_with_those_of_their_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GQA, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "folder")
    copy_tokenizer(tmp_path / "folder", 96)
    quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    found, attention = decoded(tmp_path / "out.gguf"), model.model.layers[1].self_attn
    assert types(tmp_path / "out.gguf")["blk.1.attn_q.bias"] == "F32"
    assert torch.equal(found["blk.1.attn_q.bias"], attention.q_proj.bias.data[torch.from_numpy(row_order(48, 4))])
    assert torch.equal(found["blk.1.attn_k.bias"], attention.k_proj.bias.data[torch.from_numpy(row_order(24, 2))])
    assert torch.equal(found["blk.1.attn_v.bias"], attention.v_proj.bias.data)


def test_damaged_weights_leave_nothing(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4, layers=1)
    state = load_file(tmp_path / "folder/model.safetensors")
    state["model.norm.weight"][3] = torch.nan
    save_file(state, tmp_path / "folder/model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 of 128 values are NaN"):
        quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def copy_tokenizer(folder: Path, vocabulary: int) -> None:
    """The bundled tokenizer, cut to so many tokens."""
    data = json.loads((TINY_LLAMA / "tokenizer.json").read_text())
    vocab = {token: i for token, i in data["model"]["vocab"].items() if i < vocabulary}
    data["model"] |= {"vocab": vocab, "merges": []}
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocabulary]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    shutil.copy(TINY_LLAMA / "tokenizer_config.json", folder)


def test_mistakes(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4, layers=1)
    (tmp_path / "there.gguf").write_bytes(b"mine")
    source, new = str(tmp_path / "folder"), str(tmp_path / "new.gguf")
    cases = {
        (source, str(tmp_path / "there.gguf")): "exists (a file) and is never overwritten",
        (source, str(tmp_path / "new")): "pass --format",
        (source, str(tmp_path / "new"), "--format", "gguf"): "ends in .gguf",
        (source, new, "--format", "awq"): "is the name of a GGUF file",
        (source, new, "--requantize", "q4_k_x"): "Q4_K",
        (source, new, "--requantize", "iq2_xs"): "not supported",
        (source, new, "--token-embedding", "q9"): "--token-embedding",
        (source, new, "--max-shard", "big"): "--max-shard 'big' is not a size",
        (source, new, "--pre", "no-such"): "no-such",
        (source, str(tmp_path / "new"), "--format", "gptq", "--requantize", "q4_0"): "only a GGUF file has mixes",
        (source, str(tmp_path / "new"), "--format", "gptq", "--max-shard", "4G"): "--max-shard is for GGUF files",
        (str(tmp_path / "none"), new): "none",
        (source, str(tmp_path / "folder/in.gguf")): "lies in the model's own folder",
    }
    for args, message in cases.items():
        result = CliRunner().invoke(app, ["convert", *args])
        assert result.exit_code == 2, (args, result.stdout, result.stderr)
        assert message in result.stderr, args
        assert "Traceback" not in result.stderr
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there.gguf"]


def test_a_kill_leaves_a_folder_that_the_next_run_replaces(tmp_path: Path) -> None:
    write(tmp_path / "folder", INT4, layers=1)
    partial = tmp_path / "out.gguf.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"convert": "elsewhere", "format": "gguf"}\n')
    (partial / "out.gguf").write_bytes(b"half")
    quantkit.convert(tmp_path / "folder", tmp_path / "out.gguf")
    assert not partial.exists()
    partial = tmp_path / "two.gguf.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("somebody's")
    with pytest.raises(UserError, match="not a quantkit run"):
        quantkit.convert(tmp_path / "folder", tmp_path / "two.gguf")
    assert (partial / "notes.txt").read_text() == "somebody's"


def test_sizes() -> None:
    for text, size in {
        "4G": 4 * 10**9,
        "500M": 5 * 10**8,
        "1.5GB": 1.5e9,
        "100k": 10**5,
        "7": 7,
        "4 GiB": 2**32,
    }.items():
        assert Choices(max_shard=text).shard_bytes == size
