"""quantkit imatrix: sums of squares of what each linear and the head read, as the original model runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from typer.testing import CliRunner

import quantkit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.main import app
from quantkit.errors import UserError
from quantkit.formats.gguf.imatrix import ImatrixEntry, importance_of, read_imatrix
from quantkit.formats.gguf.tensor_names import places
from quantkit.model.meta_model import build_meta_model, read_config
from quantkit.model.streamed_model import StreamedModel
from quantkit.model.ties import settle_ties
from quantkit.model.weight_sources import weight_sources
from quantkit.progress import Progress
from quantkit.quantization.imatrix import gather
from tests.tiny_models import random_tokens, tiny_model

TINY_LLAMA = Path(__file__).parents[2] / "examples/tiny-llama"


def gathered(folder: Path, ids_ST: Tensor) -> dict[str, ImatrixEntry]:
    checkpoint = Checkpoint.open(folder)
    model = build_meta_model(read_config(folder, trust_remote_code=False), trust_remote_code=False)
    sources = weight_sources(model, checkpoint.tensors)
    settle_ties(model, sources, lambda one, other: True)
    streamed = StreamedModel(model, sources, checkpoint, torch.float32, torch.device("cpu"))
    named = places(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    return gather(streamed, ids_ST, named, Progress("off"))


def sums_by_hooks(model: nn.Module, ids_ST: Tensor) -> dict[str, Tensor]:
    """Module -> sum of x^2 over all tokens, of every nn.Linear of the whole model."""
    sums: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_: nn.Module, args: tuple, name: str = name) -> None:
                sums[name] = args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(ids_ST)
    return sums


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_every_linear_and_the_head(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    ids_ST = random_tokens(model, 6, 16)
    found, expected = gathered(tmp_path, ids_ST), sums_by_hooks(model, ids_ST)
    names = {place.tensor: key.removesuffix(".weight") for key, place in places(
        Checkpoint.open(tmp_path).config, {n: i.shape for n, i in Checkpoint.open(tmp_path).tensors.items()}
    ).items()}  # fmt: skip
    assert len(found) == len(expected) == 15
    assert "output.weight" in found  # not tied
    for tensor, entry in found.items():
        assert entry.sums.shape[0] == 1
        assert entry.counts.tolist() == [96]
        np.testing.assert_allclose(entry.sums[0], expected[names[tensor]].numpy(), rtol=1e-4)


def test_a_tied_heads_input_goes_under_the_embeddings_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    ids_ST = random_tokens(model, 2, 16)
    found, expected = gathered(tmp_path, ids_ST), sums_by_hooks(model, ids_ST)
    assert "output.weight" not in found
    np.testing.assert_allclose(found["token_embd.weight"].sums[0], expected["lm_head"].numpy(), rtol=1e-4)


def test_experts_have_sums_and_counts_of_their_own(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    ids_ST = random_tokens(model, 4, 16)
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    found = gathered(tmp_path, ids_ST)
    with torch.no_grad():
        model(ids_ST)
    x_MK, chosen = seen[0][0].reshape(-1, seen[0][0].shape[-1]), seen[0][1]
    for expert in range(4):
        tokens = (chosen == expert).any(-1)
        for part in ("gate", "up"):
            entry = found[f"blk.0.ffn_{part}_exps.weight"]
            assert entry.counts[expert] == int(tokens.sum())
            np.testing.assert_allclose(entry.sums[expert], x_MK[tokens].square().sum(0).numpy(), rtol=1e-4, atol=1e-6)
    down = found["blk.0.ffn_down_exps.weight"]
    assert down.sums.shape == (4, 24)
    gate, up = (x_MK @ w.T for w in experts.gate_up_proj[0].detach().chunk(2))
    inside = (nn.functional.silu(gate) * up)[(chosen == 0).any(-1)]
    np.testing.assert_allclose(down.sums[0], inside.square().sum(0).numpy(), rtol=1e-4, atol=1e-6)
    assert "blk.0.ffn_gate_inp.weight" not in found


def test_experts_that_no_token_reached(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    found = gathered(tmp_path, random_tokens(model, 1, 1))  # one token goes to two of four experts
    for part in ("gate", "up", "down"):
        entry = found[f"blk.1.ffn_{part}_exps.weight"]
        assert sorted(entry.counts.tolist()) == [0, 0, 1, 1]
        assert (entry.sums[entry.counts == 0] == 0).all()
        assert (entry.importance()[entry.counts == 0] == 1).all()


def test_command_and_function_write_the_same(tmp_path: Path) -> None:
    text, files = TINY_LLAMA / "eval.txt", [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    args = ["imatrix", "--model", str(TINY_LLAMA), "--output", str(files[0]), "--data", str(text)]
    result = CliRunner().invoke(app, [*args, "--samples", "2", "--seq-len", "64", "--json", "--quiet"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["entries"], report["samples"], report["seq_len"]) == (43, 2, 64)
    made = quantkit.imatrix(
        TINY_LLAMA, files[1], calibration={"data": str(text), "samples": 2, "seq_len": 64}, progress="off"
    )
    assert (made.entries, made.unreached) == (43, {})
    assert files[0].read_bytes() == files[1].read_bytes()
    found = read_imatrix(files[0])
    assert (found.datasets, found.chunks, found.chunk_size) == ((str(text),), 2, 64)
    importance = importance_of(found, "blk.5.ffn_down.weight")
    assert importance is not None
    assert (importance > 0).all()


def test_mistakes_are_answered_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"mine")
    cases = {
        ("--model", str(TINY_LLAMA)): "no output file: pass --output FILE",
        ("--output", "x.gguf"): "no model",
        (
            "--model",
            str(TINY_LLAMA),
            "--output",
            str(tmp_path / "there.gguf"),
        ): "exists (a file) and is never overwritten",
        ("--model", str(tmp_path / "none"), "--output", str(tmp_path / "x.gguf")): "none",
        ("--model", str(TINY_LLAMA), "--output", str(tmp_path / "x.gguf"), "--samples", "many"): "--samples many",
        ("--model", str(TINY_LLAMA), "--output", str(tmp_path / "x.gguf"), "--data", "no.txt"): "no.txt",
    }
    for args, message in cases.items():
        result = CliRunner().invoke(app, ["imatrix", *args])
        assert result.exit_code == 2, (args, result.stderr)
        assert message in result.stderr
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"


def test_an_architecture_without_gguf_names_is_refused(tmp_path: Path) -> None:
    tiny_model("olmo2").save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="olmo2"):
        quantkit.imatrix(tmp_path / "m", tmp_path / "x.gguf", progress="off")
    assert not (tmp_path / "x.gguf").exists()
