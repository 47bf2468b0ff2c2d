"""A model that is never whole in memory: parameters on the meta device, one decoder block filled at a time.

The embedding is never loaded either: its rows are read from the file as the calibration tokens ask for them.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, UserError
from quantkit.model.meta_model import find_blocks
from quantkit.model.weight_sources import TensorSlice

T = TypeVar("T")
TRIAL_TOKENS = 16

if TYPE_CHECKING:
    from quantkit.quantization.transforms.rotation import ModelRotation

Sources = dict[str, list[TensorSlice]]


def read_param(
    checkpoint: Checkpoint, pieces: list[TensorSlice], shape: torch.Size, dtype: torch.dtype | None
) -> Tensor:
    """One parameter put together from its checkpoint tensors; NaN or Inf is a UserError naming the tensor."""
    whole = None
    for piece in pieces:
        source = checkpoint.read(piece.name)
        check_finite(source, piece.name)
        part = piece.of(source)
        if dtype is not None:
            part = part.to(dtype)
        if not piece.where:
            if part.shape != shape:
                got, expected = tuple(part.shape), tuple(shape)
                raise UserError(f"{checkpoint.folder}: {piece.name} is {got}, config.json asks for {expected}")
            return part.contiguous()
        whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
        whole[piece.where] = part
    assert whole is not None
    return whole


def check_finite(tensor: Tensor, name: str) -> None:
    """UserError naming the tensor when a value is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # float8 has no such reduction
    if all(torch.isfinite(end) for end in wide.aminmax()):
        return  # both ends are NaN when any value is; only then look at each
    flat = tensor.reshape(-1)
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in flat.split(1 << 22))
    raise UserError(f"{name}: {bad} of {flat.numel()} values are NaN or infinite; the weights are damaged")


def materialize(
    module: nn.Module,
    prefix: str,
    sources: Sources,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Fill the module's meta parameters from the checkpoint, as `dtype` (None: as on file) on `device`."""
    for name, param in list(module.named_parameters()):
        pieces = sources[f"{prefix}{name}"]
        set_param(module, name, read_param(checkpoint, pieces, param.shape, dtype).to(device))


def release(module: nn.Module) -> None:
    """Put the module's parameters back on the meta device."""
    for name, param in list(module.named_parameters()):
        set_param(module, name, param.to("meta"))


def set_param(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


class _RowsFromFile(TorchFunctionMode):
    """F.embedding on a table, or indexing one, reads just the rows asked for from the checkpoint."""

    def __init__(self, weights: dict[int, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.embedding and id(args[1]) in self.weights:
            return self.weights[id(args[1])](args[0])
        if func is Tensor.__getitem__ and id(args[0]) in self.weights:
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if isinstance(first, int | Tensor):  # some models look up the row of a padding token
                rows = self.weights[id(args[0])](torch.as_tensor(first))
                return rows[(..., *rest)] if rest else rows
        return func(*args, **(kwargs or {}))


def _unread(table: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Stands for a table that is read row by row: its shape on a real device, in four bytes.

    Models move token ids to where the table lies, so it must not be on meta. NaN, so that no other use passes unseen.
    """
    return nn.Parameter(
        torch.full((1,), torch.nan, dtype=dtype, device=device).expand(table.shape), requires_grad=False
    )


class _BeforeHead(TorchFunctionMode):
    """Ends the model's run at the product with the head's weight; `seen` is what it reads."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.seen: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.linear and len(args) > 1 and args[1] is self.weight:
            self.seen = args[0]
            raise _Stop
        return func(*args, **(kwargs or {}))


class _Stop(Exception):  # noqa: N818 (control flow, not an error)
    pass


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls one block: hidden states first, then these."""

    args: tuple
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for hidden [batch, seq, hidden]."""
        with torch.no_grad():
            output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def cache_place(self) -> int | str | None:
        """The position among `args` or the keyword of the argument that is a cache; None where there is none."""
        given = (*enumerate(self.args), *self.kwargs.items())
        return next((place for place, value in given if isinstance(value, Cache)), None)

    def with_cache(self, place: int | str, cache: Cache) -> "BlockCall":
        """The same call with `cache` in its place, as `cache_place` names it."""
        if isinstance(place, str):
            return BlockCall(self.args, self.kwargs | {place: cache})
        return BlockCall((*self.args[:place], cache, *self.args[place + 1 :]), self.kwargs)


class StreamedModel:
    """The meta model, its blocks, and what reaches the first of them.

    rotation  once set, blocks are filled and embedding rows are read rotated
    """

    rotation: "ModelRotation | None" = None

    def __init__(
        self, model: PreTrainedModel, sources: Sources, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model, self.sources, self.checkpoint, self.dtype, self.device = model, sources, checkpoint, dtype, device
        self.path, self.blocks = find_blocks(model)
        for name, buffer in model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        self._tables: dict[int, Callable[[Tensor], Tensor]] = {}

    def prefix(self, index: int) -> str:
        return f"{self.path}.{index}."

    def fill(self, index: int, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Block `index` with its weights from the checkpoint."""
        block = self.blocks[index]
        materialize(block, self.prefix(index), self.sources, self.checkpoint, dtype or self.dtype, self.device)
        if self.rotation is not None:
            self.rotation.rotate_block(block, index)
        return block

    def first_call(self, ids: Tensor, *, use_cache: bool = False) -> tuple[Tensor, list[BlockCall]]:
        """Hidden states [batch, seq, hidden] entering block 0 for ids [batch, seq], and how each block is called.

        use_cache: the model makes itself an empty cache and hands it to its blocks.
        """
        self._fill_surroundings()
        for as_tuple in (False, True):  # a few models unpack a tuple from each block
            record: list[tuple[Tensor, BlockCall]] = []
            with suppress(_Stop), self._recording(record, as_tuple), _RowsFromFile(self._tables), torch.no_grad():
                self.model(input_ids=ids.to(self.device), use_cache=use_cache)
            hidden = [entry[0] for entry in record]
            if len(record) == len(self.blocks) and all(h is hidden[0] for h in hidden):
                return hidden[0], [entry[1] for entry in record]
        raise RunError(
            f"{self.path}: {len(record)} of {len(self.blocks)} blocks ran in a row on the same hidden states; "
            "this architecture does not chain its blocks plainly and cannot be quantized block by block"
        )

    def ends(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What enters block 0 and, did the blocks change nothing, the head: both [..., hidden], for ids [batch, seq].

        None where the head is no linear of those states.
        """
        self._fill_surroundings()
        head = self.model.get_output_embeddings()
        for as_tuple in (False, True):
            record: list[tuple[Tensor, BlockCall]] = []
            mode = _BeforeHead(getattr(head, "weight", None))
            recording = self._recording(record, as_tuple, stop=False)
            with suppress(_Stop), recording, _RowsFromFile(self._tables), mode, torch.no_grad():
                self.model(input_ids=ids.to(self.device), use_cache=False)
            hidden = [entry[0] for entry in record]
            if mode.seen is not None and len(record) == len(self.blocks) and all(h is hidden[0] for h in hidden):
                return hidden[0], mode.seen
        return None

    @contextmanager
    def _recording(self, record: list[tuple[Tensor, BlockCall]], as_tuple: bool, stop: bool = True) -> Iterator[None]:
        def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            record.append((hidden_states, BlockCall(args, kwargs)))
            if stop and len(record) == len(self.blocks):
                raise _Stop
            return (hidden_states,) if as_tuple else hidden_states

        try:
            for block in self.blocks:
                block.forward = recorder
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _fill_surroundings(self) -> None:
        """Everything outside the blocks but the big tables: those are read row by row, the head is never needed."""
        if self._tables:
            return
        head = self.model.get_output_embeddings()
        for module_name, module in self.model.named_modules():
            if module_name == self.path or module_name.startswith(self.path + ".") or module is head:
                continue
            for leaf, param in list(module.named_parameters(recurse=False)):
                name = f"{module_name}.{leaf}" if module_name else leaf
                pieces = self.sources.get(name)
                if isinstance(module, nn.Embedding) and pieces is not None:
                    table = _unread(param, self.device, self.dtype)
                    for owner in self.model.modules():  # a tied head is the same parameter, and stays so
                        for key, other in list(owner.named_parameters(recurse=False)):
                            if other is param:
                                setattr(owner, key, table)
                    self._tables[id(table)] = self._rows_reader(pieces[0].name)
                elif pieces is not None:
                    set_param(
                        module, leaf, read_param(self.checkpoint, pieces, param.shape, self.dtype).to(self.device)
                    )

    def _rows_reader(self, tensor_name: str) -> Callable[[Tensor], Tensor]:
        def rows(ids: Tensor) -> Tensor:
            table = self.checkpoint.rows(tensor_name, ids.reshape(-1).cpu())
            check_finite(table, tensor_name)
            if self.rotation is not None:
                table = self.rotation.outside(tensor_name, table)
            return table.reshape(*ids.shape, -1).to(self.device, self.dtype)

        return rows


def structure_key(block: nn.Module) -> Hashable:
    """Equal for blocks that run alike, so that one trace and one proof hold for all: classes, shapes and flags."""
    modules = tuple(
        (
            path,
            type(module).__qualname__,
            tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, str)) and k != "training")),
        )
        for path, module in block.named_modules()
    )
    return modules, tuple((name, tuple(param.shape)) for name, param in block.named_parameters())


def trial_ids(streamed: StreamedModel) -> Tensor:
    """A few token ids [1, TRIAL_TOKENS] that every model knows."""
    return (torch.arange(TRIAL_TOKENS) % streamed.model.config.get_text_config().vocab_size).reshape(1, -1)


def once_per_structure(streamed: StreamedModel, look: Callable[[int, nn.Module, Tensor, BlockCall], T]) -> list[T]:
    """look(index, block, hidden states, how the block is called) for each block; blocks of one structure share it."""
    hidden, calls = streamed.first_call(trial_ids(streamed))
    known: dict[Hashable, T] = {}
    found = []
    for index, block in enumerate(streamed.blocks):
        key = structure_key(block)
        if key not in known:
            streamed.fill(index)
            try:
                known[key] = look(index, block, hidden, calls[index])
            finally:
                release(block)
        found.append(known[key])
    return found
