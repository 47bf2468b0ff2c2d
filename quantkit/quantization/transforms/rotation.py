"""One rotation of the residual stream for a whole model: blocks, embeddings, final norm and head, as they are streamed.

Hidden states come out of the embedding as x R, every block maps x R to block(x) R (`turns` finds and proves it), and
the head reads them back: W diag(final norm) R. The model's function stays; its weights have no outlier channels left.
A head that was tied to the embedding becomes a tensor of its own, for only one of the two absorbs the final norm.

Shapes: H = hidden size, V = vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.rotation import apply_columns, rotation_of, undo_columns
from quantkit.checkpoint.writer import TensorLayout
from quantkit.errors import UserError
from quantkit.model.block_graph import BlockGraph
from quantkit.model.block_trial import (
    once_per_structure,
    trial_ids,
)
from quantkit.model.fold_search import distinct_scales, norm_kind
from quantkit.model.folds import PROOF, relative_change, wide_parameters
from quantkit.model.matmul_tracing import Float64
from quantkit.model.model_ends import model_ends
from quantkit.model.streamed_model import (
    BlockCall,
    StreamedModel,
    check_finite,
)
from quantkit.quantization.transforms.rotation_search import BlockRotation, find_rotation, neutral, rotate_block

CHUNK = 64 << 20  # bytes of a large tensor that are turned at a time


class ModelRotation:
    """How the tensors of one model are rewritten. Everything is found and proved when it is made.

    blocks    what turns, by block
    sources   name of each rewritten tensor outside the blocks -> checkpoint tensor it is made from
    layouts   the tensors among them which the checkpoint lacks (the head of a tied model)
    """

    def __init__(self, streamed: StreamedModel, graphs: list[BlockGraph], *, seed: int = 0) -> None:
        """Find and prove the rotation of a streamed that has none; graphs of all blocks, with folds.

        UserError naming the model and the reason where its architecture cannot be rotated.
        """
        config = streamed.model.config
        text = config.get_text_config()
        self.checkpoint, self.graphs = streamed.checkpoint, graphs
        self.sources: dict[str, str] = {}
        self.layouts: list[TensorLayout] = []
        try:
            self.rotation = rotation_of(text.hidden_size, seed)
            self.blocks = self._find_blocks(streamed, text)
            self._find_ends(streamed)
        except UserError as error:
            kind = getattr(config, "model_type", type(streamed.model).__name__)
            raise UserError(f"{streamed.checkpoint.folder}: a {kind} model cannot be rotated: {error}") from error

    def rotate_block(self, block: nn.Module, index: int) -> None:
        """Turn a block just filled from the checkpoint, in place."""
        rotate_block(block, self.graphs[index].matrices, self.blocks[index])

    def outside(self, name: str, rows: Tensor) -> Tensor:
        """Rows of the rewritten tensor `name` from the same rows of its source, in the source's dtype.

        Tensors that are not rewritten come back as they are.
        """
        if name not in self.sources:
            return rows
        if name == self.norm_name:
            return torch.full_like(rows, neutral(self.norm_kind))
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if name == self.head_name:
            wide = wide * self.final_H.to(wide)
        return apply_columns(wide, self.rotation).to(rows.dtype)

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states of the original model, [..., H], from those of the rotated one."""
        return undo_columns(hidden, self.rotation)

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the rewritten tensor `name`, a part at a time; NaN and Inf are refused."""
        source = self.sources[name]
        info = self.checkpoint.info(source)
        step = max(1, CHUNK // max(1, info.nbytes // info.shape[0]))
        for start in range(0, info.shape[0], step):
            rows = self.checkpoint.rows(source, torch.arange(start, min(start + step, info.shape[0])))
            check_finite(rows, source)
            yield start, self.outside(name, rows)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json for the rotated model: its head is not tied."""
        if not self.tied:
            return config
        changed = config | {"tie_word_embeddings": False}
        if isinstance(inner := config.get("text_config"), dict):
            changed["text_config"] = inner | {"tie_word_embeddings": False}
        return changed

    def report(self) -> dict[str, Any]:
        """Lines for the report: what turned, with the largest error of the proofs."""
        first = self.blocks[0]
        return {
            "rotation": f"random-sign Hadamard, {self.rotation.size} channels in blocks of {self.rotation.block}",
            "norms": sorted(first.norms),
            "heads": [f"{v} -> {o}" for v, o in first.heads],
            "notes": sorted({note for turns in self.blocks for note in turns.notes}),
            "untied": self.tied,
            "proof": max(turns.error for turns in self.blocks),
        }

    def _find_blocks(self, streamed: StreamedModel, text: Any) -> list[BlockRotation]:
        per_head = text.hidden_size // max(1, getattr(text, "num_attention_heads", 1))
        named = [getattr(text, key, None) for key in ("v_head_dim", "head_dim")]
        sizes = list(dict.fromkeys(size for size in (*named, per_head) if isinstance(size, int) and size > 0))

        def find(index: int, block: nn.Module, hidden: Tensor, call: BlockCall) -> BlockRotation:
            try:
                return find_rotation(block, self.graphs[index], (hidden, *call.args), call.kwargs, self.rotation, sizes)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                raise UserError(f"in block {index}, {reason}") from error

        return once_per_structure(streamed, find)

    def _find_ends(self, streamed: StreamedModel) -> None:
        """Name the embeddings, the final norm and the head, and prove what becomes of them."""
        model, H = streamed.model, self.rotation.size
        head = model.get_output_embeddings()
        outside = {
            path: module
            for path, module in model.named_modules()
            if path != streamed.path and not path.startswith(streamed.path + ".")
        }
        norms: dict[str, list[tuple[tuple, Any]]] = {}

        def keep(path: str) -> Any:
            return lambda module, inputs, output: norms.setdefault(path, []).append((inputs, output))

        handles = [
            module.register_forward_hook(keep(path))
            for path, module in outside.items()
            if {name for name, _ in module.named_parameters()} in ({"weight"}, {"weight", "bias"})
            and all(param.shape == (H,) for param in module.parameters())
        ]
        ids = trial_ids(streamed)
        try:
            with Float64():
                straight = model_ends(streamed, ids)
        finally:
            for handle in handles:
                handle.remove()
        if straight is None or head is None:
            raise UserError("its head is not a linear that reads the hidden states")
        if len(norms) != 1 or len(runs := next(iter(norms.values()))) != 1:
            raise UserError(f"between the embedding and the head {len(norms)} norms run beside the blocks, not one")
        path, module = next(iter(norms)), outside[next(iter(norms))]
        scale_H = distinct_scales(H, torch.Generator().manual_seed(0), runs[0][1])
        try:
            self.norm_kind = norm_kind(module, *runs[0], scale_H)
        except Exception as error:
            raise UserError(f"{path}: {error}") from error
        weight_H = module.get_parameter("weight").data
        weight_H = weight_H.to(torch.promote_types(weight_H.dtype, torch.float32))
        self.final_H = weight_H + 1 if self.norm_kind == "norm+1" else weight_H.clone()

        tables = {
            f"{name}.weight": table
            for name, table in outside.items()
            if isinstance(table, nn.Embedding) and table.embedding_dim == H
        }
        for name in tables:
            source = self._name_on_file(streamed, name)
            self.sources[source] = source
        self.norm_name = self._name_on_file(streamed, f"{path}.weight")
        self.sources[self.norm_name] = self.norm_name
        self._name_head(streamed, head, tables)
        self._prove_ends(streamed, module, ids, straight)

    def _name_head(self, streamed: StreamedModel, head: nn.Module, tables: dict[str, nn.Embedding]) -> None:
        path = next(name for name, module in streamed.model.named_modules() if module is head)
        twin = next((name for name, table in tables.items() if table.weight is head.weight), None)
        self.tied = twin is not None
        if twin is None:
            self.head_name = self._name_on_file(streamed, f"{path}.weight")
            self.sources[self.head_name] = self.head_name
            return
        source = self._name_on_file(streamed, twin)
        before = source.removesuffix(twin) if source.endswith(twin) else ""  # what the file puts before every name
        self.head_name = f"{before}{path}.weight"
        self.sources[self.head_name] = source
        if self.head_name not in self.checkpoint.tensors:
            info = self.checkpoint.info(source)
            self.layouts.append(TensorLayout(self.head_name, info.dtype, tuple(info.shape)))

    @staticmethod
    def _name_on_file(streamed: StreamedModel, name: str) -> str:
        pieces = streamed.sources.get(name, [])
        if len(pieces) != 1 or pieces[0].where or pieces[0].part or pieces[0].transposed:
            raise UserError(f"{name} is not one whole tensor of the checkpoint")
        return pieces[0].name

    def _prove_ends(
        self, streamed: StreamedModel, norm: nn.Module, ids: Tensor, straight: tuple[Tensor, Tensor]
    ) -> None:
        """In float64: what leaves the turned embedding is x R, and the turned head reads what the original one did."""
        with wide_parameters(norm, {"weight"}), Float64():
            norm.get_parameter("weight").data.fill_(neutral(self.norm_kind))
            turned = model_ends(streamed.with_rewrite(self), ids)
        assert turned is not None
        entering = relative_change([turned[0]], [apply_columns(straight[0].double(), self.rotation)])
        if not entering < PROOF:
            raise UserError(f"its embedding does not reach the first block as it is (changes by {entering:.1e})")
        read = undo_columns(turned[1], self.rotation) * self.final_H.double()
        leaving = relative_change([read], [straight[1]])
        if not leaving < PROOF:
            raise UserError(f"its head does not read the final norm alone (changes by {leaving:.1e})")
