"""How every batch calls every block: what is the same for all batches is kept once, the rest for each batch.

Attention masks and rotary tables depend on nothing but the batch's size. Embeddings of tokens for each layer, or
masks of token types, are as different as the tokens; they are spilled to disk like the hidden states.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quantkit.model.streamed_model import BlockCall
from quantkit.quantization.calibration import spill

ALIGNMENT = 64  # bytes; a tensor in a batch's array starts at a multiple


class BlockCalls:
    """Calls of blocks by batch, added with `add` and read with `of`."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self._skipped = set[int]()  # blocks that the model leaves out, the same for all batches
        self.kept_bytes = 0  # of tensors that are kept for single batches
        self._shared: dict[int, list[tuple[list[Any], TreeSpec]]] = {}  # by batch size and block
        self._own: dict[int, list[dict[int, Any]]] = {}  # by first sample, then by block: leaves that are its own
        self._whole: dict[int, list[BlockCall]] = {}  # by first sample: calls of another structure

    def add(self, part: slice, calls: list[BlockCall]) -> None:
        """Keep how the samples of `part` call each block."""
        self._skipped = {block for block, call in enumerate(calls) if call.skipped}
        flat = [tree_flatten((call.args, call.kwargs)) for call in calls]
        shared = self._shared.setdefault(part.stop - part.start, flat)
        if any(spec != known for (_, spec), (_, known) in zip(flat, shared, strict=True)):
            self._whole[part.start] = calls
            return
        own = [
            {i: leaf for i, (leaf, known) in enumerate(zip(leaves, kept, strict=True)) if not same(leaf, known)}
            for (leaves, _), (kept, _) in zip(flat, shared, strict=True)
        ]
        if any(own):
            self._own[part.start] = self._stored(own)

    def of(self, part: slice, block: int) -> BlockCall:
        """How the samples of `part` call this block, tensors on the device."""
        if part.start in self._whole:
            return self._whole[part.start][block]
        leaves, spec = self._shared[part.stop - part.start][block]
        if part.start in self._own:
            leaves = list(leaves)
            for i, leaf in self._own[part.start][block].items():
                leaves[i] = leaf.to(self.device) if isinstance(leaf, Tensor) else leaf
        args, kwargs = tree_unflatten(leaves, spec)
        return BlockCall(args, kwargs, block in self._skipped)

    def _stored(self, own: list[dict[int, Any]]) -> list[dict[int, Any]]:
        """The same leaves with their tensors in one array on the host; blocks given one tensor share it there."""
        places: dict[tuple, tuple[int, Tensor]] = {}
        total = 0
        for leaf in (leaf for leaves in own for leaf in leaves.values() if isinstance(leaf, Tensor)):
            if key_of(leaf) not in places:
                places[key_of(leaf)] = total, leaf
                total += -(-leaf.numel() * leaf.element_size() // ALIGNMENT) * ALIGNMENT
        array = spill.allocate((total,), torch.uint8, self.folder, beside=self.kept_bytes)
        self.kept_bytes += total
        copies: dict[tuple, Tensor] = {}
        for key, (start, leaf) in places.items():
            bytes_ = array[start : start + leaf.numel() * leaf.element_size()]
            copies[key] = bytes_.view(leaf.dtype).reshape(leaf.shape)
            copies[key].copy_(leaf)
        return [
            {i: copies[key_of(leaf)] if isinstance(leaf, Tensor) else leaf for i, leaf in leaves.items()}
            for leaves in own
        ]


def key_of(tensor: Tensor) -> tuple:
    """Equal for tensors that are the same view of the same memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def same(leaf: Any, known: Any) -> bool:
    """Whether two batches give a block the same: by value where values can be compared, else by identity."""
    if leaf is known:
        return True
    if isinstance(leaf, Tensor) and isinstance(known, Tensor):
        alike = leaf.shape == known.shape and leaf.dtype == known.dtype and leaf.device == known.device
        return alike and torch.equal(leaf, known)
    if type(leaf) is not type(known) or not isinstance(leaf, bool | int | float | str | bytes | complex | torch.dtype):
        return False
    return bool(leaf == known)
