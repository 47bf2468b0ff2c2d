"""GPTQ's quantization_config in its two versions, and which tensors belong to it; no torch."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.types import KVSpec, Scheme, TensorSpec

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # what gptqmodel, the reader behind transformers, has kernels for


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """What one version of the format says; `shift` is what stored zero points lack."""

    name: str
    shift: int

    MARK: str = "qweight"
    SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    SIGNED_SCALES: bool = True
    KV_NAMES: tuple[str, str] | None = None

    def stored(self, shape: tuple[int, int], scheme: Scheme, scale_tag: str | None) -> common.Stored:
        """Suffix -> (dtype, shape) of the tensors of a weight (N, K); UserError if it cannot be held."""
        (N, K), spec = shape, scheme.weights
        if scheme.activations is not None:
            raise UserError(
                f"{self.name} has no quantized inputs ({scheme.activations}); compressed-tensors holds {scheme}"
            )
        if spec.bits not in BITS or (spec.element, spec.scale_format, spec.scale_rows) != ("int", "float", 1):
            raise UserError(
                f"{self.name} holds integers of 2, 3, 4 or 8 bits with a scale per group of a row, not {spec}"
            )
        if spec.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UserError(f"{self.name} readers know the group sizes {sizes}, not {spec.group_size}")
        for count, what in ((K, "in"), (N, "out")):
            if count * spec.bits % 32:
                raise UserError(f"{self.name}: {count} {what} features of {spec.bits} bits do not fill 32-bit words")
        if scale_tag != "F16":
            raise UserError(f"{self.name} scales are float16, not {common.dtype_name(scale_tag)}")
        G = spec.groups(K)
        return {
            "qweight": ("I32", (K * spec.bits // 32, N)),
            "qzeros": ("I32", (G, N * spec.bits // 32)),
            "scales": ("F16", (G, N)),
            "g_idx": ("I32", (K,)),
        }

    def shape_of(self, tensors: common.Headers, scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module, from its headers; UserError where one does not fit the scheme. g_idx may be absent."""
        common.require(tensors, set(self.SUFFIXES), scheme, {"g_idx"})
        words, N = common.matrix(tensors, "qweight")
        K = words * 32 // scheme.weights.bits
        common.check_shapes(tensors, self.stored((N, K), scheme, "F16"), (N, K), scheme)
        return N, K

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
        """quantization_config for config.json: the commonest scheme for all, `dynamic` rules for modules that differ.

        A dense linear gets a rule that leaves it out, except for the head, which is dense unless `lm_head` is true.
        gptqmodel and vLLM follow the rules. transformers does not: it knows one scheme, and of dense linears those that
        are dense in every block, which it finds in modules_in_block_to_quantize.
        """
        if not schemes:
            raise UserError("no module is quantized: there is nothing to describe")
        ignored = set(ignored)
        common.refuse_both(schemes, ignored)
        common.refuse_kv(kv, self.name)
        most = Counter(schemes.values()).most_common(1)[0][0]
        others = {name: scheme for name, scheme in schemes.items() if scheme != most}
        skip: dict[str, Any] = dict.fromkeys(ignored - {"lm_head"})
        dynamic = {}
        for name, scheme in sorted((skip | others).items(), key=lambda item: common.natural(item[0])):
            for alias in (name, _fused(name, schemes)):
                if alias is not None:
                    sign = "+:" if scheme else "-:"
                    dynamic[f"{sign}^{re.escape(alias)}$"] = _numbers(scheme.weights) if scheme else {}
        parts = _block_parts(schemes, skip)
        return {
            "quant_method": "gptq",
            **_numbers(most.weights),
            "desc_act": False,
            "lm_head": "lm_head" in schemes,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "dynamic": dynamic,
            **({"modules_in_block_to_quantize": [parts]} if parts else {}),
        }

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """quantize_config.json, the place from before config.json told it."""
        return {"quantize_config.json": dict(quantization_config)}

    def read_config(self, quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
        """Which of the modules are stored quantized, and how; UserError for what is not this version of GPTQ."""
        qc = quantization_config
        version = qc.get("checkpoint_format") or "gptq"
        if qc.get("quant_method", "gptq") != "gptq" or version != self.name:
            raise UserError(f"quant_method {qc.get('quant_method')!r} in format {version!r} is not {self.name}")
        dynamic = qc.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise UserError("quantization_config.dynamic is not a list of rules by pattern")
        rules = [(_compiled(pattern), pattern.startswith("-:"), settings) for pattern, settings in dynamic.items()]
        found = {}
        for name in modules:
            if name == "lm_head" and not qc.get("lm_head"):
                continue
            rule = next((rule for rule in rules if rule[0].match(name)), None)
            if rule is None or not rule[1]:
                found[name] = Scheme(_read_numbers({**qc, **((rule[2] if rule else None) or {})}))
        return found

    def read_kv(self, quantization_config: Mapping[str, Any]) -> KVSpec | None:
        """None: the format has no place for one."""
        return None


V1, V2 = GptqConfig("gptq", 1), GptqConfig("gptq_v2", 0)


def _numbers(spec: TensorSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}


def _read_numbers(settings: Mapping[str, Any]) -> TensorSpec:
    bits, size, symmetric = settings.get("bits"), settings.get("group_size", -1), settings.get("sym", True)
    if not isinstance(bits, int) or not isinstance(size, int) or not isinstance(symmetric, bool):
        raise UserError(f"gptq with bits {bits!r}, group_size {size!r} and sym {symmetric!r} cannot be read")
    return TensorSpec(bits, size, symmetric)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("+:").removeprefix("-:"))
    except re.error as error:
        raise UserError(f"quantization_config.dynamic: {pattern} is not a regular expression: {error}") from error


FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def _fused(name: str, schemes: Mapping[str, Scheme]) -> str | None:
    """The name vLLM looks for once it has put the projections of one input together, where all of them are alike."""
    parent, _, leaf = name.rpartition(".")
    if leaf not in FUSED:
        return None
    siblings = [f"{parent}.{other}" for other, fused in FUSED.items() if fused == FUSED[leaf]]
    return f"{parent}.{FUSED[leaf]}" if len({schemes.get(sibling) for sibling in siblings}) == 1 else None


def _block_parts(schemes: Mapping[str, Scheme], skipped: Iterable[str]) -> list[str]:
    """Names within a block of what is quantized, where blocks have dense linears too and all blocks are alike."""
    quantized, dense = ({_within(name) for name in names} - {None} for names in (schemes, skipped))
    return sorted(part for part in quantized if part) if dense and not quantized & dense else []


def _within(name: str) -> str | None:
    """A module's name after the first number in it, None where there is none."""
    parts = name.split(".")
    return next((".".join(parts[i + 1 :]) or None for i, part in enumerate(parts) if part.isdigit()), None)
