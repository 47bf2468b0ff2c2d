"""The writer: safetensors' own bytes, resumable files, clear refusals, side files."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from quantkit.checkpoint.header import DTYPES, torch_dtype
from quantkit.checkpoint.output_folder import (
    copy_side_files,
)
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import (
    INDEX,
    ShardWriter,
    TensorLayout,
)
from quantkit.errors import RunError, UserError


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    held = {f"t.{tag}": torch.randint(0, 100, (3, 5)).to(torch_dtype(tag)) for tag in DTYPES if tag != "F8_E8M0"}
    return held | {"é": torch.tensor(1.5), 'quote"': torch.zeros(0, 2), "b": torch.randn(9), "a": torch.randn(9)}


def layouts(held: dict[str, Tensor]) -> list[TensorLayout]:
    return [TensorLayout(name, t.dtype, tuple(t.shape)) for name, t in held.items()]


def test_same_bytes_as_safetensors(tmp_path: Path) -> None:
    held = tensors()
    writer = ShardWriter(tmp_path, [layouts(held)], 1 << 30)
    for name, tensor in reversed(held.items()):
        writer.write(name, tensor)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == save(held, metadata={"format": "pt"})


def test_shards_keep_units_together(tmp_path: Path) -> None:
    held = {f"m{i}.{leaf}": torch.full((25,), float(i)) for i in range(5) for leaf in ("weight", "bias")}
    units = [layouts({k: v for k, v in held.items() if k.startswith(f"m{i}.")}) for i in range(5)]
    writer = ShardWriter(tmp_path, units, 450)
    for name, tensor in held.items():
        writer.write(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 1000 == writer.data_bytes
    assert [index["weight_map"][f"m{i}.weight"][10:11] for i in range(5)] == ["1", "1", "2", "2", "3"]
    for file in files:
        with safe_open(tmp_path / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert set(shard.keys()) == {name for name, where in index["weight_map"].items() if where == file}
            assert all(torch.equal(shard.get_tensor(name), held[name]) for name in shard.keys())  # noqa: SIM118
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).tensors.keys() == held.keys()


def test_a_unit_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    held = {"a": torch.ones(4), "b": torch.ones(400), "c": torch.ones(4)}
    writer = ShardWriter(tmp_path, [layouts({k: v}) for k, v in held.items()], 100)
    assert [list(shard.spans) for shard in writer._shards] == [["a"], ["b"], ["c"]]
    writer.close()


def test_writes_any_strides(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    writer = ShardWriter(tmp_path, [layouts({"x": x.T})], 1 << 20)
    writer.write("x", x.T)
    writer.finish()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x"), x.T)


def test_refuses_another_dtype_or_shape(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [layouts({"x": torch.ones(3)})], 1 << 20)
    with pytest.raises(RunError, match=r"x: torch.float32 \[4\]"):
        writer.write("x", torch.ones(4))
    with pytest.raises(RunError, match=r"x: torch.float64 \[3\]"):
        writer.write("x", torch.ones(3, dtype=torch.float64))
    writer.close()
    with pytest.raises(UserError, match="complex128"):
        ShardWriter(tmp_path, [layouts({"x": torch.ones(3, dtype=torch.complex128)})], 1 << 20)


def test_resume_goes_on_in_the_same_files(tmp_path: Path) -> None:
    held = tensors()
    first = ShardWriter(tmp_path, [layouts(held)], 1 << 30)
    assert first.created == held.keys()
    names = list(held)
    for name in names[:7]:
        first.write(name, held[name])
    first.close()  # as a kill leaves it
    second = ShardWriter(tmp_path, [layouts(held)], 1 << 30)
    assert not second.created
    for name in names[7:]:
        second.write(name, held[name])
    second.finish()
    assert (tmp_path / "model.safetensors").read_bytes() == save(held, metadata={"format": "pt"})
    again = ShardWriter(tmp_path, [layouts(held)], 1 << 30)  # killed between finish and what follows it
    again.finish()
    assert (tmp_path / "model.safetensors").read_bytes() == save(held, metadata={"format": "pt"})


def test_resume_makes_a_half_made_file_anew(tmp_path: Path) -> None:
    held = {"x": torch.ones(100)}
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 8 + b'{"x"')
    writer = ShardWriter(tmp_path, [layouts(held)], 1 << 20)
    assert writer.created == {"x"}
    writer.write("x", held["x"])
    writer.finish()
    assert (tmp_path / "model.safetensors").read_bytes() == save(held, metadata={"format": "pt"})


def test_resume_refuses_another_file(tmp_path: Path) -> None:
    ShardWriter(tmp_path, [layouts({"x": torch.ones(100)})], 1 << 20).close()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="not what this run would write"):
        ShardWriter(tmp_path, [layouts({"x": torch.ones(99)})], 1 << 20)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_copy_from(tmp_path: Path) -> None:
    source = tmp_path / "source"
    held = {"a": torch.randn(7, 3).to(torch.bfloat16), "b": torch.arange(5)}
    writer = ShardWriter(source, [layouts(held)], 1 << 20)
    for name, tensor in held.items():
        writer.write(name, tensor)
    writer.finish()
    (source / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(source)
    copier = ShardWriter(tmp_path / "copy", [layouts({"x.a": held["a"], "b": held["b"]})], 1 << 20)
    copier.copy_from(checkpoint, "a", "x.a")
    copier.copy_from(checkpoint, "b", "b")
    with pytest.raises(RunError, match="the layout has"):
        copier.copy_from(checkpoint, "b", "x.a")
    copier.finish()
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x.a"), held["a"])
        assert torch.equal(file.get_tensor("b"), held["b"])


def fail(code: int):
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail(code))
    with pytest.raises(RunError, match=r"needs 0\.00 GiB, .* GiB free at"):
        ShardWriter(tmp_path, [layouts({"x": torch.ones(100)})], 1 << 20)
    assert not list(tmp_path.iterdir())


def test_more_than_the_disk_holds(tmp_path: Path) -> None:
    huge = TensorLayout("x", torch.uint8, (1 << 60,))
    with pytest.raises(RunError, match=r"needs 1073741824\.00 GiB"):
        ShardWriter(tmp_path, [[huge]], 1 << 62)
    assert not list(tmp_path.iterdir())


def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, [layouts({"x": torch.ones(100)})], 1 << 20)
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC))
    with pytest.raises(RunError, match="not enough disk space"):
        writer.write("x", torch.ones(100))
    monkeypatch.setattr(os, "pwrite", fail(errno.EIO))
    with pytest.raises(RunError, match="Input/output error"):
        writer.write("x", torch.ones(100))
    writer.close()


def test_file_systems_without_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.EOPNOTSUPP))
    writer = ShardWriter(tmp_path, [layouts({"x": torch.ones(100)})], 1 << 20)
    writer.write("x", torch.ones(100))
    writer.finish()


def test_headers_are_checked_at_the_end(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [layouts({"x": torch.ones(100)})], 1 << 20)
    (tmp_path / "model.safetensors").write_bytes(save({"x": torch.ones(50)}))
    with pytest.raises(RunError, match="changed under the run"):
        writer.finish()


def test_side_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "spiece.model", "chat_template.jinja"]
    kept += ["modeling_own.py", "qwen.tiktoken", "LICENSE", "additional_chat_templates/tool.jinja"]
    left = ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "README.md"]
    left += ["hf_quant_config.json", "quantize_config.json", "old.gguf", ".gitattributes", "original/params.json"]
    for name in kept + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(f"{name}\r\n\xff".encode("latin1"))
    target.mkdir()
    assert copy_side_files(source, target) == sorted(kept)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == sorted(kept)
    for name in kept:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_side_files_do_not_follow_links_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("s")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="link"):
        copy_side_files(source, tmp_path)


def test_rows_one_part_after_the_other(tmp_path: Path) -> None:
    held = torch.randn(10, 3)
    writer = ShardWriter(tmp_path, [layouts({"x": held})], 1 << 20)
    for start in (4, 8, 0):
        writer.write_rows("x", start, held[start : start + 4])
    assert torch.equal(writer.read("x"), held)
    with pytest.raises(RunError, match="x: rows 8 to 12"):
        writer.write_rows("x", 8, held[:4])
    with pytest.raises(RunError, match=r"x: rows 0 to 1 of .*float64"):
        writer.write_rows("x", 0, held[:1].double())
