"""All formats by name, and which of them can hold a weight."""

import torch

from quantkit.errors import UserError
from quantkit.formats import awq, fp8, gptq, modelopt
from quantkit.formats.compressed_tensors import tensors as compressed_tensors
from quantkit.formats.gguf import linears as gguf
from quantkit.formats.interface import Format as Format
from quantkit.types import Scheme

FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq.V1,
    "gptq_v2": gptq.V2,
    "fp8": fp8.BLOCKS,
    "fp8_tensor": fp8.TENSOR,
    "modelopt": modelopt,
    "gguf": gguf,
}


def holders(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[str]:
    """The formats that can hold a weight (N, K), stored as `dtype` so far, in this scheme."""
    return [name for name, format_ in FORMATS.items() if _holds(format_, shape, scheme, dtype)]


def _holds(format_: Format, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> bool:
    try:
        format_.layout(shape, scheme, format_.scale_dtype(scheme, dtype))
    except UserError:
        return False
    return True
