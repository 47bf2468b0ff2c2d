"""A checkpoint whose stacks of experts look as if every expert's matrix were a tensor of its own.

Some models keep one matrix of all experts of a layer in one tensor [E, N, K] (or [E, K, N]), two of them side by side
or row by row in turn. Here such a tensor is replaced by its parts; a part is read when it is asked for.

Shapes: E = experts, N = out features, K = in features.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.rawio import as_bytes, write_at
from quantkit.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """stack[expert], transposed first where it is stored [K, N], and of that these rows: [N, K], or [N] of a bias."""

    stack: str
    expert: int
    transposed: bool
    rows: slice

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, given the stack's."""
        N, *K = whole[:0:-1] if self.transposed else whole[1:]
        return (len(range(N)[self.rows]), *K)


class UnstackedCheckpoint(Checkpoint):
    """`whole` with some of its tensors replaced by parts of them; its fingerprint is that of `whole`."""

    def __init__(self, whole: Checkpoint, parts: Mapping[str, ExpertPart]) -> None:
        stacks = {part.stack for part in parts.values()}
        tensors = {name: info for name, info in whole.tensors.items() if name not in stacks}
        super().__init__(whole.folder, whole.config, tensors | {n: _info(whole, p) for n, p in parts.items()})
        self.whole, self.parts = whole, parts

    def without(self, stacks: Collection[str]) -> Checkpoint:
        """The same where these stacks are left whole."""
        parts = {name: part for name, part in self.parts.items() if part.stack not in stacks}
        return UnstackedCheckpoint(self.whole, parts) if parts else self.whole

    def read(self, name: str) -> "Tensor":
        import torch

        part = self.parts.get(name)
        if part is None:
            return self.whole.read(name)
        matrix = self.whole.rows(part.stack, torch.tensor([part.expert]))[0]
        return (matrix.mT if part.transposed else matrix)[part.rows].contiguous()

    def rows(self, name: str, index: "Tensor") -> "Tensor":
        import torch

        if name not in self.parts:
            return self.whole.rows(name, index)
        matrix = self.read(name)
        # float8 has no indexing kernels on every device, bytes do
        taken = matrix.reshape(len(matrix), -1).view(torch.uint8)[index.cpu()]
        return taken.view(matrix.dtype).reshape(-1, *matrix.shape[1:])

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return bytes(as_bytes(self.read(name))[start:stop]) if name in self.parts else self.whole.raw(name, start, stop)

    def copy(self, name: str, fd: int, offset: int) -> None:
        if name in self.parts:
            write_at(fd, self.read(name), offset)
        else:
            self.whole.copy(name, fd, offset)

    def fingerprint(self) -> str:
        return self.whole.fingerprint()


def _info(whole: Checkpoint, part: ExpertPart) -> TensorInfo:
    """What the part is; its bytes have the right number, but no place in the file."""
    info = whole.info(part.stack)
    shape, size = part.shape(info.shape), info.itemsize
    for length in shape:
        size *= length
    return TensorInfo(info.tag, shape, info.file, 0, size)
