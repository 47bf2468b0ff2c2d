"""A run that is killed at a block, for tests of going on where it stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from quantkit.quantization.block_quantizer import BlockQuantizer


@contextmanager
def killed_at(block: int) -> Iterator[None]:
    """Inside, the run dies when it reaches this block, as by Ctrl-C; it must get that far."""
    real = BlockQuantizer.quantize_block

    def dies(self: BlockQuantizer, index: int, note: Callable[[str], None]) -> Any:
        if index == block:
            raise KeyboardInterrupt
        return real(self, index, note)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockQuantizer, "quantize_block", dies)
        with pytest.raises(KeyboardInterrupt):
            yield
