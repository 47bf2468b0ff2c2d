"""Numbers read with numpy are those torch reads: every code of every dtype of one or two bytes, and wider ones."""

import pytest
import torch

from quantkit.checkpoint.header import DTYPES, torch_dtype
from quantkit.verification.values import decode

ALL = b"".join(n.to_bytes(2, "little") for n in range(1 << 16))  # every pair of bytes, so every float16 and bfloat16


@pytest.mark.parametrize("tag", sorted(DTYPES.keys() - {"C64", "BOOL"}))
def test_as_torch_reads_them(tag: str) -> None:
    expected = torch.frombuffer(bytearray(ALL), dtype=torch_dtype(tag))
    wide = expected.to(torch.float32).double() if tag.startswith("F8") else expected.double()
    found = torch.from_numpy(decode(tag, ALL))
    assert torch.equal(found.isnan(), wide.isnan())
    assert torch.equal(found.nan_to_num(), wide.nan_to_num())
