"""Quantized linears of a GGUF as a Format: one tensor of blocks each. Names and keys are made for the whole file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats.common import Layout
from quantkit.formats.gguf.block_bytes import pack as pack_blocks
from quantkit.formats.gguf.block_bytes import unpack as unpack_blocks
from quantkit.ggml_types import GGML_TYPES
from quantkit.types import KVSpec, QuantizedWeight, Scheme

MARK = "weight"
SUFFIXES: Sequence[str] = ("weight",)
SIGNED_SCALES = True
KV_NAMES: tuple[str, str] | None = None


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """Weights are decoded in float32, whatever they were stored as."""
    return torch.float32


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> Layout:
    """One tensor of bytes [N, bytes of a row]; UserError for schemes that no GGUF type stands for."""
    spec = scheme.weights
    if spec.element != "block" or scheme.activations is not None:
        raise UserError(f"GGUF has types of its own, and {scheme} is none of them")
    if shape[1] % spec.group_size:
        raise UserError(f"rows of {shape[1]} columns are no whole blocks of {spec}, which have {spec.group_size}")
    return {"weight": (torch.uint8, (shape[0], GGML_TYPES[spec.block_type].row_bytes(shape[1])))}


def pack(q: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The blocks of a weight, uint8 [N, bytes of a row]."""
    return {"weight": pack_blocks(q)}


def check_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """(N, K) of the blocks; UserError where they are not whole blocks of bytes."""
    blocks, kind = tensors["weight"], GGML_TYPES[scheme.weights.block_type]
    if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % kind.nbytes:
        raise UserError(f"{blocks.dtype} {list(blocks.shape)} is no matrix of whole {scheme.weights} blocks")
    return blocks.shape[0], blocks.shape[1] // kind.nbytes * kind.columns


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`."""
    _, K = check_tensors(tensors, scheme)
    return unpack_blocks(tensors["weight"], scheme.weights, K)


def config(schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
    """A GGUF has no quantization_config: each tensor's header names its type."""
    return {}


def files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """No further files."""
    return {}


def read_config(quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Nothing is described here."""
    return {}


def read_kv(quantization_config: Mapping[str, Any]) -> KVSpec | None:
    """llama.cpp's cache is chosen when it starts."""
    return None
