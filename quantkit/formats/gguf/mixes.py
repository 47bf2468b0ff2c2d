"""Which type each tensor of a GGUF file has: the mixes that llama.cpp's llama-quantize knows by name. No torch.

The rules are those of its source (llama-quant.cpp, October 2026), their oddities included: files of the same name then
have the same types and the same size, whoever made them. Tensors are judged in llama.cpp's order (those outside the
blocks, then block by block, by name), because some rules count the tensors seen so far.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from quantkit.errors import UserError
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, QUANTIZED, SHORT_MIXES
from quantkit.suggestions import nearest

_BASE = {  # the type of the tensors that a mix says nothing else about
    "F32": "F32", "F16": "F16", "BF16": "BF16",
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
    "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
}  # fmt: skip
MIXES = tuple(_BASE)
TYPES = (*QUANTIZED, "F16", "BF16", "F32")  # what a tensor can be given by name

# Rows that a block of 256 does not divide have blocks of 32 instead, about as large.
_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_ATTENTION_VALUES = ("attn_v.weight", "attn_qkv.weight")
# Lattices, ternary types and floats of llama.cpp, and the types of ik_llama.cpp.
_NOT_OURS = re.compile(r"IQ[123]_|TQ\d|Q[12]_0|Q2_K_S|MXFP|NVFP|IQ\d_K|Q\d_KV|.*_(KT|R[48])$")
_CLASSES = {  # std::regex knows them, Python does not
    "[:digit:]": "0-9", "[:alpha:]": "a-z", "[:alnum:]": "a-z0-9", "[:lower:]": "a-z", "[:space:]": r"\s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TypeChoice:
    """The type of one tensor, and the one that was wanted: another where its blocks do not divide the rows."""

    wanted: str
    type: str


@dataclass(frozen=True, slots=True)
class _Model:
    """What the rules ask about a model; values: attn_v tensors, seventy_b: shaped like Llama 2 70B or Qwen2 72B."""

    layers: int
    values: int
    heads_per_key: int
    experts: int
    tied: bool
    seventy_b: bool


def mix_name(name: str) -> str:
    """A mix's name in MIXES, from any case and from llama-quantize's short names; UserError where there is none."""
    upper = SHORT_MIXES.get(name.strip().upper(), name.strip().upper())
    if upper in _BASE:
        return upper
    if _NOT_OURS.match(upper):
        raise UserError(f"gguf mix {name!r} is not supported\nhint: there are {', '.join(MIXES)}")
    near = nearest(name, MIXES, cutoff=0.7)
    hint = f"did you mean `{near}`?" if near else f"there are {', '.join(MIXES)}"
    raise UserError(f"unknown gguf mix {name!r}\nhint: {hint}")


def type_name(name: str, where: str) -> str:
    """A tensor type's name in TYPES, from any case; UserError, which names `where`, for one quantkit does not write."""
    upper = name.strip().upper()
    if upper in TYPES:
        return upper
    said = "unsupported" if upper in GGML_TYPES or _NOT_OURS.match(upper) else "unknown"
    raise UserError(f"{where}: {said} tensor type {name!r}\nhint: use one of {', '.join(TYPES)}")


def file_type(mix: str) -> int:
    """The number for general.file_type of a mix."""
    return FILE_TYPES[mix_name(mix)]


def file_type_of(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """general.file_type of a list of types without a name: that of the mix whose base type most weights have."""
    weights: dict[str, int] = {}
    for name, type_ in types.items():
        weights[type_] = weights.get(type_, 0) + prod(shapes[name])
    most = max(weights, key=lambda type_: weights[type_])
    return FILE_TYPES[SHORT_MIXES.get(most, most)]


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp would quantize a tensor: not vectors, norms, routers of experts, embeddings of positions."""
    matrix = prod(shape[:-1]) > 1 and name.endswith("weight")
    return matrix and not any(part in name for part in ("_norm.weight", "ffn_gate_inp.weight", "position_embd"))


def fitting_type(type_: str, columns: int) -> str:
    """The type itself, or what llama.cpp uses for rows that its blocks do not divide: blocks of 32, then F16."""
    for choice in (type_, _SMALLER_BLOCKS.get(type_, type_)):
        if columns % GGML_TYPES[choice].columns == 0:
            return choice
    return "F16"


def bytes_of(type_: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data."""
    return prod(shape[:-1]) * GGML_TYPES[type_].row_bytes(shape[-1])


def size_by_type(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Tensors and bytes of each type that occurs, most bytes first."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, type_ in types.items():
        tensors, nbytes = sizes.get(type_, (0, 0))
        sizes[type_] = tensors + 1, nbytes + bytes_of(type_, shapes[name])
    return dict(sorted(sizes.items(), key=lambda item: -item[1][1]))


def tensor_types(
    mix: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    architecture: str,
    metadata: Mapping[str, tuple[str, Any]],
    imatrix: bool,
    pure: bool = False,
    overrides: Mapping[str, str] | None = None,
    token_embedding: str | None = None,
    output: str | None = None,
) -> dict[str, str]:
    """The type of every tensor in the order of `shapes`, as `llama-quantize --dry-run` lists them; see type_choices."""
    choices = type_choices(
        mix, shapes, architecture=architecture, metadata=metadata, imatrix=imatrix, pure=pure,
        overrides=overrides, token_embedding=token_embedding, output=output,
    )  # fmt: skip
    return {name: choice.type for name, choice in choices.items()}


def type_choices(
    mix: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    architecture: str,
    metadata: Mapping[str, tuple[str, Any]],
    imatrix: bool,
    pure: bool = False,
    overrides: Mapping[str, str] | None = None,
    token_embedding: str | None = None,
    output: str | None = None,
) -> dict[str, TypeChoice]:
    """The type of every tensor and the one wanted for it, in the order of `shapes`; F32 for what is never quantized.

    mix              a name in MIXES
    shapes           rows first (numpy's order), by GGUF name
    metadata         the keys of the file, (kind, value): block_count, attention.head_count(_kv) and expert_count count
    imatrix          whether an importance matrix is used: three mixes have other types then
    pure             the mix's base type for all
    overrides        type by regular expression, searched in the name; the first that matches wins. As in llama-quantize
                     it is lower-cased first, goes before `pure`, and counts for nothing in F32, F16 and BF16
    token_embedding  the type of token_embd.weight; goes before everything else
    output           the type of output.weight; of token_embd.weight if that is the head too and the mix decides on it
    Raises UserError for an unknown mix or type, a bad pattern, one that matches no tensor that can be quantized.
    """
    mix = mix_name(mix)
    base = _BASE[mix]
    named = [(pattern, type_name(type_, f"tensor_types: {pattern!r}")) for pattern, type_ in (overrides or {}).items()]
    head = None if output is None else type_name(output, "output")
    embedding = None if token_embedding is None else type_name(token_embedding, "token_embedding")
    model = _model(architecture, metadata, shapes)
    candidates = [name for name, shape in shapes.items() if quantizable(name, shape)]
    patterns = [(_compiled(pattern, candidates), type_) for pattern, type_ in named]
    rules = _Rules(mix, base, model, imatrix, head)
    choices: dict[str, TypeChoice] = {name: TypeChoice("F32", "F32") for name in shapes}
    for name in sorted(candidates, key=_llama_order):
        if name == "token_embd.weight" and embedding:
            wanted = embedding
        elif name == "output.weight" and head:
            wanted = head
        elif base not in QUANTIZED:
            wanted = base
        elif (override := next((type_ for pattern, type_ in patterns if pattern.search(name)), None)) is not None:
            wanted = override
        else:
            wanted = base if pure else rules.type_of(name)
        choices[name] = TypeChoice(wanted, fitting_type(wanted, shapes[name][-1]))
    return choices


def given_types(
    shapes: Mapping[str, tuple[int, ...]],
    overrides: Mapping[str, str] | None = None,
    token_embedding: str | None = None,
    output: str | None = None,
) -> dict[str, str]:
    """The types of the tensors that mixes do not decide on: never quantized ones, and those the user gives a type.

    Arguments and errors are those of type_choices.
    """
    one, other = (
        type_choices(
            mix, shapes, architecture="", metadata={}, imatrix=False,
            overrides=overrides, token_embedding=token_embedding, output=output,
        )
        for mix in ("Q4_0", "Q8_0")
    )  # fmt: skip
    return {name: choice.type for name, choice in one.items() if choice.wanted == other[name].wanted}


def _llama_order(name: str) -> tuple[int, str]:
    """The order in which llama.cpp goes through a file's tensors, wherever they lie."""
    return _layer(name), name


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _model(architecture: str, metadata: Mapping[str, tuple[str, Any]], names: Iterable[str]) -> _Model:
    def number(key: str, default: int) -> int:
        value = metadata[f"{architecture}.{key}"][1] if f"{architecture}.{key}" in metadata else default
        return int(value[0] if isinstance(value, (list, tuple)) else value)  # of the first layer, as llama.cpp has it

    names = list(names)
    layers, heads, experts = number("block_count", 0), number("attention.head_count", 0), number("expert_count", 0)
    keys = number("attention.head_count_kv", heads)
    seventy_b = layers == 80 and (architecture == "qwen2" or (architecture == "llama" and heads != keys))
    return _Model(
        layers=layers,
        values=sum(name.endswith(_ATTENTION_VALUES) for name in names),
        heads_per_key=heads // keys if keys else 0,
        experts=experts,
        tied="output.weight" not in names,
        seventy_b=seventy_b and experts != 8,
    )


def _compiled(pattern: str, names: list[str]) -> re.Pattern[str]:
    """The pattern as llama-quantize reads it; UserError where it is none or finds nothing."""
    text = pattern.lower()
    for posix, ours in _CLASSES.items():
        text = text.replace(posix, ours)
    try:
        compiled = re.compile(text, re.ASCII)
    except re.error as error:
        raise UserError(
            f"tensor_types: {pattern!r} is no regular expression: {error}\nhint: write `\\.` for a dot"
        ) from None
    if not any(compiled.search(name) for name in names):
        short = [re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in names]
        near = nearest(pattern, [*dict.fromkeys(short), *names])
        known = ", ".join(dict.fromkeys(short))
        hint = f"did you mean `{near}`?" if near else f"the names are {known}"
        raise UserError(f"tensor_types: {pattern!r} matches no tensor that can be quantized\nhint: {hint}")
    return compiled


class _Rules:
    """A mix's own choice for each tensor, asked in llama.cpp's order: it counts attn_v and ffn_down tensors."""

    def __init__(self, mix: str, base: str, model: _Model, imatrix: bool, head: str | None) -> None:
        self.mix, self.base, self.model, self.imatrix, self.head = mix, base, model, imatrix, head
        self.values = self.downs = 0  # seen so far; those that an override decided on are not counted

    def type_of(self, name: str) -> str:
        if name == "output.weight" or (self.model.tied and name == "token_embd.weight"):
            return self.head or ("Q8_0" if self.base == "Q8_0" else "Q6_K")
        if name.endswith(_ATTENTION_VALUES):
            self.values += 1
            return self._value_type(self.values - 1)
        if name.endswith("attn_k.weight"):
            return "Q8_0" if self.model.experts == 8 else self.base
        if name.endswith("attn_output.weight"):
            return self._attention_output_type()
        if "ffn_down" in name:
            self.downs += 1
            return self._down_type(_layer(name) if self.model.experts > 1 else self.downs - 1)
        return self.base

    def _value_type(self, i: int) -> str:
        mix, many = self.mix, self.model.heads_per_key >= 4
        if self.model.experts == 8:
            return "Q8_0"
        if mix == "Q2_K":
            chosen = "Q4_K" if many else "Q3_K"
        elif mix == "Q3_K_M":
            chosen = "Q5_K" if i < 2 else "Q4_K"
        elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and many) or (mix == "Q4_K_S" and i < 4):
            chosen = "Q5_K"
        elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(i, self.model.values):
            chosen = "Q6_K"
        else:
            chosen = self.base
        return "Q5_K" if self.model.seventy_b and chosen in ("Q3_K", "Q4_K") else chosen

    def _attention_output_type(self) -> str:
        if self.model.experts == 8:
            raised = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")  # Q3_K_L is not
            return "Q5_K" if self.mix in raised else self.base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.mix, self.base)

    def _down_type(self, i: int) -> str:
        mix, layers = self.mix, self.model.layers
        first = i < layers // 8
        if mix == "Q2_K":
            return "Q3_K"
        if mix == "Q3_K_M":
            return "Q5_K" if i < layers // 16 else "Q4_K"
        if mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _more_bits(i, layers) else self.base
        if mix == "Q3_K_L" or (first and (mix == "Q4_K_S" or (mix in ("IQ4_NL", "IQ4_XS") and not self.imatrix))):
            return "Q5_K"
        if first and self.imatrix and mix in ("Q4_0", "Q5_0"):
            return "Q4_1" if mix == "Q4_0" else "Q5_1"
        return self.base


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
