"""The two dialects of `quant_method: fp8`, and which tensors belong to them; no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.types import BLOCK, PRESETS, ActivationSpec, KVSpec, Scheme

STATIC = PRESETS["FP8"]
TOKEN = Scheme(STATIC.weights, ActivationSpec(8, element="float"))


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """What one dialect says; `schemes` by activation_scheme are all it can say."""

    name: str
    MARK: str
    SUFFIXES: tuple[str, ...]
    schemes: Mapping[str, Scheme]

    SIGNED_SCALES: bool = False  # floats have a sign of their own: nothing would be gained
    KV_NAMES: tuple[str, str] | None = None

    def stored(self, shape: tuple[int, int], scheme: Scheme, scale_tag: str | None) -> common.Stored:
        """Suffix -> (dtype, shape) of the tensors of a weight (N, K); UserError if it cannot be held."""
        if scheme not in self.schemes.values():
            raise UserError(f"{self.name} holds {' or '.join(map(str, self.schemes.values()))}; not {scheme}")
        if scale_tag != "F32":
            raise UserError(f"{self.name} scales are float32, not {common.dtype_name(scale_tag)}")
        N, K = shape
        scale = () if scheme.weights.scale_rows == -1 else (-(-N // BLOCK), scheme.weights.groups(K))
        tensors: common.Stored = {"weight": ("F8_E4M3", (N, K)), self.MARK: ("F32", scale)}
        if scheme == STATIC:
            tensors["input_scale"] = ("F32", ())
        return tensors

    def shape_of(self, tensors: common.Headers, scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module, from its headers; UserError where one of them does not fit the scheme."""
        common.require(tensors, {"weight", self.MARK} | ({"input_scale"} if scheme == STATIC else set()), scheme)
        shape = common.matrix(tensors, "weight")
        common.check_shapes(tensors, self.stored(shape, scheme, "F32"), shape, scheme)
        return shape

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


BLOCKS = Fp8Config("fp8", "weight_scale_inv", ("weight", "weight_scale_inv"), {"dynamic": PRESETS["FP8_BLOCK"]})
TENSOR = Fp8Config(
    "fp8_tensor", "weight_scale", ("weight", "weight_scale", "input_scale"), {"dynamic": TOKEN, "static": STATIC}
)
