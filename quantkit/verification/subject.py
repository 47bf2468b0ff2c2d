"""The words of verify: a finding, the number format a config states, and what the rules look at."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from quantkit.verification.findings import Finding

Shape = tuple[int, int]


class TensorHeader(Protocol):
    """What a file's header, or a plan of one, says of a tensor. tag: safetensors' name of the dtype."""

    @property
    def tag(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Modules = Mapping[str, Mapping[str, TensorHeader]]  # module -> its tensors by suffix
ENGINES = ("vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm")
FUSING = ("vllm", "sglang", "tensorrt-llm")  # these merge siblings into one layer and split layers over GPUs

# One layer of the engine for several of the checkpoint.
FAMILIES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_ALIAS = {member: fused for fused, members in FAMILIES.items() for member in members}
# Layers whose input is what the tensor-parallel split cuts; of all others the outputs are cut.
_ROW = {"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2", "wo"}
_REPLICATED = {"gate", "router", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa"}
HEADS = ("lm_head", "embed_out", "output", "output_projection", "head")


@dataclass(frozen=True, slots=True)
class DeclaredNumbers:
    """A number format as configs state it. group_size -1: no groups. dynamic: True, False or "local"."""

    bits: int
    kind: str  # "int" or "float"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int = -1
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None
    actorder: str | None = None

    def __str__(self) -> str:
        size = f"g{self.group_size}" if self.group_size > 0 else self.strategy
        name = f"{'fp' if self.kind == 'float' else 'int'}{self.bits}{'' if self.symmetric else ' asym'}"
        return f"{name} {size}"


@dataclass(frozen=True, slots=True)
class DeclaredScheme:
    """How the config says a module is stored. layout names its tensors: a compressed-tensors format, awq, gptq, ..."""

    layout: str
    weights: DeclaredNumbers
    inputs: DeclaredNumbers | None = None
    outputs: DeclaredNumbers | None = None
    where: str = "quantization_config"

    @property
    def keeps_weight(self) -> bool:
        """The codes are stored as `weight` [N, K], not under a name of their own such as weight_packed or qweight."""
        return not self.layout.endswith("pack-quantized") and self.layout not in ("awq", "gptq")

    def __str__(self) -> str:
        return f"{self.layout}: {self.weights}" + (f", input {self.inputs}" if self.inputs else "")


@dataclass(frozen=True, slots=True)
class Subject:
    """What the rules look at.

    qc        quantization_config as it is written; method its quant_method
    model     config.json
    shapes    (N, K) of the modules whose tensors are quantized; linears: of all linear modules, dense ones included
    stated    what the config says of each module it calls quantized
    groups    what the config groups say, whether or not they match a module (compressed-tensors)
    problems  what was wrong with the config itself
    """

    qc: dict[str, Any]
    method: str
    model: dict[str, Any]
    shapes: Mapping[str, Shape]
    linears: Mapping[str, Shape]
    engine: str
    tp: int = 1
    stated: dict[str, DeclaredScheme] = field(default_factory=dict)
    groups: list[DeclaredScheme] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The output projection's name; a tied one has no tensors but is a module all the same."""
        ignored = self.qc.get("ignore")
        named = [name for name in ignored if isinstance(name, str)] if isinstance(ignored, list) else []
        return next((name for name in (*self.linears, *self.shapes, *named) if is_head(name)), "lm_head")

    @property
    def head_module(self) -> str:
        """The name of the head's module in the engine: transformers 5 renames GPT-NeoX's embed_out while loading."""
        return "lm_head" if self.engine == "transformers" and "gpt_neox" in self.model_types else self.head

    @property
    def quantized(self) -> dict[str, tuple[DeclaredScheme, Shape]]:
        """Modules both stated and stored as quantized."""
        return {name: (said, self.shapes[name]) for name, said in self.stated.items() if name in self.shapes}

    @property
    def model_types(self) -> set[str]:
        """model_type of config.json and of its text_config."""
        inner = self.model.get("text_config")
        configs = (self.model, inner if isinstance(inner, dict) else {})
        return {config["model_type"] for config in configs if isinstance(config.get("model_type"), str)}

    @property
    def head_size(self) -> int:
        """Features of an attention head; 0 where config.json does not tell, or attention is latent (MLA)."""
        if self.number("kv_lora_rank"):
            return 0
        heads = next((n for key in ("num_attention_heads", "n_head", "n_heads") if (n := self.number(key))), 0)
        width = next((n for key in ("hidden_size", "n_embd", "d_model") if (n := self.number(key))), 0)
        return self.number("head_dim") or (width // heads if heads > 0 else 0)

    def number(self, key: str, default: int = 0) -> int:
        """A whole number of config.json (of its text_config where that holds it)."""
        inner = self.model.get("text_config")
        for config in (self.model, inner if isinstance(inner, dict) else {}):
            if isinstance(config.get(key), int):
                return config[key]
        return default


def is_head(name: str) -> bool:
    """Whether a module is the output projection by its name: one of a block, with the block's number, is none."""
    *path, last = name.split(".")
    return last in HEADS and not any(part.isdigit() for part in path)


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def fused_name(name: str) -> str | None:
    """The name of the engine's layer that this module becomes a part of."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_ALIAS[last]}".lstrip(".") if last in _ALIAS else None


def siblings(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(fused name, its members among names, in the fused order), of those with more than one member."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if fused := fused_name(name):
            groups.setdefault(fused, []).append(name)
    for fused, members in sorted(groups.items()):
        if len(members) > 1:
            order = FAMILIES[leaf(fused)]
            yield fused, sorted(members, key=lambda name: order.index(leaf(name)))


def is_row(name: str) -> bool:
    return leaf(name) in _ROW


def local_shape(name: str, shape: Shape, subject: Subject) -> tuple[float, float]:
    """(N, K) of one GPU's part; not whole where the split does not come out even."""
    N, K = shape
    last, tp = leaf(name), subject.tp
    if tp == 1 or last in _REPLICATED:
        return N, K
    if is_row(name):
        return N, K / tp
    kv_heads = subject.number("num_key_value_heads")
    if last in ("k_proj", "v_proj") and 0 < kv_heads < tp:
        return N / kv_heads, K  # each GPU holds a whole head, several hold the same
    return N / tp, K


def some(names: Iterable[str]) -> str:
    """The first of the names and how many more there are."""
    listed = list(names)
    return listed[0] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "") if listed else ""


def matches(name: str, pattern: str) -> bool:
    """compressed-tensors' rule: equal, or the regex after "re:" matches from the start. A broken regex matches none."""
    if not pattern.startswith("re:"):
        return name == pattern
    try:
        return re.match(pattern[3:], name) is not None
    except re.error:
        return False
