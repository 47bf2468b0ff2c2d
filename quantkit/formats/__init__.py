"""How codes and scales lie in a file: one module per format, pure functions, no files opened here.

interface.py         class Format: the names every value of FORMATS has
compressed_tensors/ awq.py gptq.py fp8.py modelopt.py   one module per format
bitstream.py         codes of any width in words
common.py            what several formats share
quantized_folder.py  a quantized folder of any format, opened
"""

from collections.abc import Mapping
from typing import Any

import torch

from quantkit.errors import UserError
from quantkit.formats import awq, fp8, gptq, modelopt
from quantkit.formats.compressed_tensors import tensors as compressed_tensors
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
}


def format_name(quantization_config: Mapping[str, Any]) -> str | None:
    """Which of FORMATS a quantization_config describes (several share a quant_method); None: none of them."""
    method = quantization_config.get("quant_method")
    if method == "gptq":
        method = quantization_config.get("checkpoint_format") or "gptq"
    elif method == "fp8" and not quantization_config.get("weight_block_size"):
        method = "fp8_tensor"
    elif isinstance(method, str) and method.startswith("modelopt"):
        method = "modelopt"  # some writers say modelopt_fp4
    return method if method in FORMATS else None


def holders(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[str]:
    """The formats that can hold a weight (N, K), stored as `dtype` so far, in this scheme."""
    return [name for name, format_ in FORMATS.items() if _holds(format_, shape, scheme, dtype)]


def _holds(format_: Format, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> bool:
    try:
        format_.layout(shape, scheme, format_.scale_dtype(scheme, dtype))
    except UserError:
        return False
    return True
