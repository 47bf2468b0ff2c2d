"""A model that is never whole in memory: parameters on the meta device, one decoder block filled at a time.

The embedding is never loaded either: its rows are read from the file as the calibration tokens ask for them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, UserError
from quantkit.model.block_arguments import guard, named
from quantkit.model.meta_model import find_blocks
from quantkit.model.weight_sources import TensorSlice


@dataclass(frozen=True, slots=True)
class Returned:
    """Stands for what a block returns beside its states, in the calls of blocks that are handed it."""

    block: int
    position: int


SOMETHING = Returned(-1, 0)  # of the block that returns it
# what a model may expect of its blocks: states, or a tuple of them; what it hands on before what it has no use for
RETURNS: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, SOMETHING),
    lambda hidden: (hidden, SOMETHING, SOMETHING),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)

Sources = dict[str, list[TensorSlice]]


class WeightRewrite(Protocol):
    """Another parametrization of the same function, applied to weights as they are read."""

    def rotate_block(self, block: nn.Module, index: int) -> None:
        """Rewrite block `index`, just filled from the checkpoint, in place."""
        ...

    def outside(self, name: str, rows: Tensor) -> Tensor:
        """Rows of the rewritten checkpoint tensor `name` from the same rows of the original; same dtype."""
        ...


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
    """Fill the module's meta parameters from the checkpoint, as `dtype` (None: as stored) on `device`."""
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
                index = torch.as_tensor(first)
                rows = self.weights[id(args[0])](torch.where(index < 0, index + len(args[0]), index))
                return rows[(..., *rest)] if rest else rows
        return func(*args, **(kwargs or {}))


def _unread(table: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Stands for a table that is read row by row: its shape on a real device, in four bytes.

    Models move token ids to where the table lies, so it must not be on meta. NaN, so that no other use passes unseen.
    """
    return nn.Parameter(
        torch.full((1,), torch.nan, dtype=dtype, device=device).expand(table.shape), requires_grad=False
    )


class Stop(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a run of the model that has shown what it was run for."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls one block: hidden states first, then these; skipped: it does not, on a text.

    on_output  gets what the block returns where that is more than states
    """

    args: tuple
    kwargs: dict[str, Any]
    skipped: bool = False
    on_output: Callable[[tuple], None] | None = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for hidden [batch, seq, hidden]; the same where it is skipped."""
        if self.skipped:
            return hidden
        with torch.no_grad():
            output = block(hidden, *self.args, **self.kwargs)
        return self.states_of(output)

    def states_of(self, output: Any) -> Tensor:
        """The hidden states of what the block returned."""
        if isinstance(output, Tensor):
            return output
        if self.on_output is not None:
            self.on_output(output)
        return output[0]

    def handed(self) -> set[Returned]:
        """What of other blocks' outputs the block is given."""
        return {value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Returned)}

    def with_returned(self, values: Mapping[Returned, Any]) -> "BlockCall":
        """The same call with what blocks returned in its places."""
        if not self.handed():
            return self
        given = {place: values[value] for place, value in named(self.args, self.kwargs) if isinstance(value, Returned)}
        return self.with_arguments(given)

    def with_arguments(self, replaced: Mapping[int | str, Any]) -> "BlockCall":
        """The same call with other values at these positions and keywords, where it has them."""
        args = tuple(replaced.get(place, value) for place, value in enumerate(self.args))
        kwargs = {place: replaced.get(place, value) for place, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def cache_place(self) -> int | str | None:
        """The position among `args` or the keyword of the argument that is a cache; None where there is none."""
        given = (*enumerate(self.args), *self.kwargs.items())
        return next((place for place, value in given if isinstance(value, Cache)), None)

    def with_cache(self, place: int | str, cache: Cache) -> "BlockCall":
        """The same call with `cache` in its place, as `cache_place` names it."""
        return self.with_arguments({place: cache})


class StreamedModel:
    """The meta model, its blocks, and what reaches the first of them.

    rewrite  blocks are filled and embedding rows are read rewritten by it; None: as they are in the checkpoint
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Sources,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        rewrite: WeightRewrite | None = None,
    ) -> None:
        self.model, self.sources, self.checkpoint, self.dtype, self.device = model, sources, checkpoint, dtype, device
        self.rewrite = rewrite
        self.path, self.blocks = find_blocks(model)
        for name, buffer in model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        for block in self.blocks if rewrite is None else ():  # those of a rewritten model are guarded already
            guard(block)
        self._tables: dict[int, str] = {}  # id of a table that is read row by row -> its checkpoint tensor
        self._replaced: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def with_rewrite(self, rewrite: WeightRewrite) -> "StreamedModel":
        """The same model read through `rewrite`. Both may be used, one at a time: they share the meta model."""
        other = StreamedModel(self.model, self.sources, self.checkpoint, self.dtype, self.device, rewrite)
        other._tables = self._tables
        return other

    def with_tables(self, tables: Mapping[str, Callable[[Tensor], Tensor]]) -> "StreamedModel":
        """The same model with other embedding tables: checkpoint tensor -> its rows [n, H] for an index (int64 [n]).

        Both may be used, one at a time, as with `with_rewrite`.
        """
        self.fill_surroundings()
        other = copy.copy(self)
        other._replaced = tables
        return other

    def with_checkpoint(self, sources: Sources, checkpoint: Checkpoint) -> "StreamedModel":
        """The same model over a checkpoint that cuts the same weights otherwise into tensors."""
        other = copy.copy(self)
        other.sources, other.checkpoint = sources, checkpoint
        return other

    def with_dtype(self, dtype: torch.dtype) -> "StreamedModel":
        """The same model computed in another dtype."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def prefix(self, index: int) -> str:
        return f"{self.path}.{index}."

    def fill(self, index: int, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Block `index` with its weights from the checkpoint."""
        block = self.blocks[index]
        materialize(block, self.prefix(index), self.sources, self.checkpoint, dtype or self.dtype, self.device)
        if self.rewrite is not None:
            self.rewrite.rotate_block(block, index)
        return block

    def first_call(self, ids: Tensor, *, use_cache: bool = False) -> tuple[Tensor, list[BlockCall]]:
        """Hidden states [batch, seq, hidden] entering block 0 for ids [batch, seq], and how each block is called.

        Blocks that the model leaves out on a text (they attend to an image) are skipped.

        use_cache: the model makes itself an empty cache and hands it to its blocks.
        """
        runs = self._runs_through(ids, use_cache)
        for record, _ in runs:
            hidden = [entry[1] for entry in record]
            ran = [entry[0] for entry in record]
            in_order = ran == sorted(set(ran)) and ran[-1:] == [len(self.blocks) - 1]
            if in_order and all(unchanged(h, hidden[0]) for h in hidden):
                calls = dict.fromkeys(range(len(self.blocks)), BlockCall((), {}, skipped=True))
                return hidden[0], [*(calls | {entry[0]: entry[2] for entry in record}).values()]
        raise UserError(self._not_a_chain(runs))

    def _runs_through(
        self, ids: Tensor, use_cache: bool
    ) -> list[tuple[list[tuple[int, Tensor, BlockCall]], Exception | None]]:
        """Runs of the model whose blocks pass their states on, until one reaches all blocks: which ran, and the error.

        One run per thing that a model may expect its blocks to return.
        """
        self.fill_surroundings()
        runs: list[tuple[list[tuple[int, Tensor, BlockCall]], Exception | None]] = []
        for answer in RETURNS:
            record: list[tuple[int, Tensor, BlockCall]] = []
            error: Exception | None = None
            try:
                with self.streaming(record, answer, stop=True):
                    self.model(input_ids=ids.to(self.device), use_cache=use_cache)
            except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
                raise
            except Stop:
                pass
            except Exception as failure:
                error = failure
            runs.append((record, error))
            if len(record) == len(self.blocks) and all(unchanged(entry[1], record[0][1]) for entry in record):
                break
        return runs[::-1]

    def _not_a_chain(self, runs: list[tuple[list[tuple[int, Tensor, BlockCall]], Exception | None]]) -> str:
        """Why the blocks cannot be streamed, for the run that came furthest."""
        record, error = max(runs, key=lambda run: (len({entry[0] for entry in run[0]}), run[1] is None))
        kind = type(self.model).__name__
        if error is not None:
            where = f"{self.path}.{record[-1][0]}" if record else "the first block"
            return (
                f"{kind} fails on a text without images or other inputs, at or after {where}: "
                f"{type(error).__name__}: {first_line(error)}; this architecture is not supported yet"
            )
        ran = [entry[0] for entry in record]
        if len(set(ran)) < len(ran) or ran != sorted(ran):
            return f"{self.path}: {kind} does not run its blocks once each in their order, which is not supported yet"
        missing = [index for index in range(len(self.blocks)) if index not in ran]
        if missing:
            block = type(self.blocks[missing[0]]).__name__
            return (
                f"{self.path}.{missing[0]} ({block}): {kind} does not run this block on text, {len(missing)} of "
                f"{len(self.blocks)} blocks are skipped; only models that run all their blocks are supported"
            )
        changed = next(i for i, entry in enumerate(record) if not unchanged(entry[1], record[0][1]))
        return (
            f"{self.path}.{changed}: {kind} changes the hidden states between blocks {changed - 1} and {changed}; "
            "only models whose blocks read what the block before them returned are supported"
        )

    @contextmanager
    def streaming(
        self, record: list[tuple[int, Tensor, BlockCall]], answer: Callable[[Tensor], Any], stop: bool
    ) -> Iterator[None]:
        """Inside, every block only notes (index, hidden states, call) and answers with its states.

        stop: the run ends at the last block.
        """

        def recorder(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                record.append((index, hidden_states, BlockCall(args, kwargs)))
                if stop and len(record) == len(self.blocks):
                    raise Stop
                output = answer(hidden_states)
                if not isinstance(output, tuple):
                    return output
                return tuple(Returned(index, i) if o is SOMETHING else o for i, o in enumerate(output))

            return forward

        readers = {table: self._rows_reader(name) for table, name in self._tables.items()}
        try:
            for index, block in enumerate(self.blocks):
                block.forward = recorder(index)
            with _RowsFromFile(readers), torch.no_grad():
                yield
        finally:
            for block in self.blocks:
                del block.forward

    def fill_surroundings(self) -> None:
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
                    self._tables[id(table)] = pieces[0].name
                elif pieces is not None:
                    set_param(
                        module, leaf, read_param(self.checkpoint, pieces, param.shape, self.dtype).to(self.device)
                    )

    def _rows_reader(self, tensor_name: str) -> Callable[[Tensor], Tensor]:
        def rows(ids: Tensor) -> Tensor:
            if (other := self._replaced.get(tensor_name)) is not None:
                return other(ids.reshape(-1).cpu()).reshape(*ids.shape, -1).to(self.device, self.dtype)
            table = self.checkpoint.rows(tensor_name, ids.reshape(-1).cpu())
            check_finite(table, tensor_name)
            if self.rewrite is not None:
                table = self.rewrite.outside(tensor_name, table)
            return table.reshape(*ids.shape, -1).to(self.device, self.dtype)

        return rows


def unchanged(states: Tensor, given: Tensor) -> bool:
    """Whether states are those that were given, or a view of all of them."""
    if states is given:
        return True
    if not isinstance(states, Tensor):
        return False
    alike = (states.shape, states.stride(), states.dtype) == (given.shape, given.stride(), given.dtype)
    return alike and states.data_ptr() == given.data_ptr()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
