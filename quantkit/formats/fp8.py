"""`quant_method: fp8`, the two dialects of 8-bit floats that engines read under this name.

BLOCKS, DeepSeek's and transformers': weight float8_e4m3fn [N, K] and weight_scale_inv float32 [ceil(N / 128),
ceil(K / 128)], which multiplies, whatever its name says; inputs are quantized as they come, 128 features at a time.
The last blocks may be cut short, which engines read; transformers, where it dequantizes, knows whole blocks only.
TENSOR, vLLM's: weight and weight_scale float32 [], one for the tensor; inputs as they come, a scale per token, or with
input_scale float32 [] from calibration. (transformers calls the per-tensor scales differently and does not read it.)

Shapes: N = out features, K = in features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.grids.dequantize import (
    collapse,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import BLOCK, PRESETS, ActivationRange, ActivationSpec, KVSpec, QuantizedWeight, Scheme

STATIC = PRESETS["FP8"]
TOKEN = Scheme(STATIC.weights, ActivationSpec(8, element="float"))


@dataclass(frozen=True, slots=True)
class Fp8:
    """One dialect, used like a format module; `schemes` by activation_scheme are all it can say."""

    name: str
    MARK: str
    SUFFIXES: tuple[str, ...]
    schemes: Mapping[str, Scheme]

    SIGNED_SCALES: bool = False  # floats have a sign of their own: nothing would be gained
    KV_NAMES: tuple[str, str] | None = None

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever the weight was stored as."""
        return torch.float32

    def layout(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
        """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
        if scheme not in self.schemes.values():
            raise UserError(f"{self.name} holds {' or '.join(map(str, self.schemes.values()))}; not {scheme}")
        if scale_dtype != torch.float32:
            raise UserError(f"{self.name} scales are float32, not {scale_dtype}")
        N, K = shape
        scale = () if scheme.weights.scale_rows == -1 else (-(-N // BLOCK), scheme.weights.groups(K))
        tensors: common.Layout = {"weight": (FP8, (N, K)), self.MARK: (torch.float32, scale)}
        if scheme == STATIC:
            tensors["input_scale"] = (torch.float32, ())
        return tensors

    def pack(self, q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
        """The module's tensors by suffix, as `layout` announces them; the weight alone tells which."""
        if q.scale_NG.dtype != torch.float32:
            raise UserError(f"{self.name} scales are float32, not {q.scale_NG.dtype}")
        common.check_scales(q, self.name)
        scale = collapse(q.scale_NG, q.spec)
        assert torch.equal(expand(scale, q.spec, len(q.scale_NG)), q.scale_NG), "rows of a block have one scale"
        tensors = {"weight": q.codes_NK.view(FP8), self.MARK: scale.reshape(()) if q.spec.scale_rows == -1 else scale}
        if q.input is not None:
            tensors["input_scale"] = q.input.scale.reshape(()).float()
        return tensors

    def check_tensors(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module's tensors; UserError where one of them does not fit the scheme."""
        common.require(tensors, {"weight", self.MARK} | ({"input_scale"} if scheme == STATIC else set()), scheme)
        shape = common.matrix(tensors, "weight")
        common.check_shapes(tensors, self.layout(shape, scheme, torch.float32), shape, scheme)
        return shape

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of `pack`; UserError where a tensor does not fit the scheme."""
        N, _ = self.check_tensors(tensors, scheme)
        scale = tensors[self.MARK].reshape(1, 1) if scheme.weights.scale_rows == -1 else tensors[self.MARK]
        given = ActivationRange(tensors["input_scale"].reshape(())) if scheme == STATIC else None
        codes_NK = tensors["weight"].view(torch.uint8)
        return QuantizedWeight(codes_NK, expand(scale, scheme.weights, N), None, scheme.weights, input=given)

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
        """quantization_config for config.json; UserError for mixed schemes, a KV cache, or names readers confuse."""
        ignored = sorted(set(ignored), key=common.natural)
        scheme = common.sole_scheme(schemes, self.name)
        common.refuse_both(schemes, ignored)
        common.refuse_kv(kv, self.name)
        common.refuse_substrings(schemes, ignored, self.name)
        names = [activation for activation, own in self.schemes.items() if own == scheme]
        if not names:
            raise UserError(f"{self.name} holds {' or '.join(map(str, self.schemes.values()))}; not {scheme}")
        if scheme.weights.scale_rows == BLOCK:
            dialect = {"weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ignored}
        else:
            dialect = {"weight_block_size": None, "ignored_layers": ignored}
        return {"quant_method": "fp8", "activation_scheme": names[0], "fmt": "e4m3", **dialect}

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """None: config.json says it all."""
        return {}

    def read_config(self, quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
        """Which of the modules are stored quantized, and how; UserError for what is not this dialect."""
        qc = quantization_config
        if qc.get("quant_method") != "fp8":
            raise UserError(f"quant_method {qc.get('quant_method')!r} is not fp8")
        blocks, block = qc.get("weight_block_size"), self.MARK == "weight_scale_inv"
        if blocks != ([BLOCK, BLOCK] if block else None):
            raise UserError(f"fp8 with weight_block_size {blocks!r} is not {self.name}")
        if qc.get("scale_fmt") not in (None, "float"):
            raise UserError(f"fp8 with scale_fmt {qc['scale_fmt']!r} cannot be read, only plain float32 scales")
        if str(qc.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
            raise UserError(f"fp8 with fmt {qc['fmt']!r} cannot be read, only 'e4m3'")
        activation = qc.get("activation_scheme", "dynamic")
        if activation not in self.schemes:
            raise UserError(f"{self.name} with activation_scheme {activation!r} cannot be read")
        dense = common.names_of(qc, "ignored_layers", "modules_to_not_convert")
        return {name: self.schemes[activation] for name in modules if not common.listed(name, dense)}

    def read_kv(self, quantization_config: Mapping[str, Any]) -> KVSpec | None:
        """None: the format has no place for one."""
        return None


BLOCKS = Fp8("fp8", "weight_scale_inv", ("weight", "weight_scale_inv"), {"dynamic": PRESETS["FP8_BLOCK"]})
TENSOR = Fp8(
    "fp8_tensor", "weight_scale", ("weight", "weight_scale", "input_scale"), {"dynamic": TOKEN, "static": STATIC}
)
