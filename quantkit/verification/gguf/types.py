"""Types of tensors: what engines multiply with, what rows allow, and whether general.file_type says what is there."""

from collections import Counter

from quantkit.checkpoint.gguf_header import GgufFile, GgufTensor
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES
from quantkit.verification.findings import Finding, error, info, warning
from quantkit.verification.subject import some

FLOATS = ("F32", "F16", "BF16")
# Only inside an engine, for inputs, or for numbers that are not weights.
_NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
# What llama.cpp's quantizer takes where a row is no multiple of 256 columns; F16 where it is none of 32.
FALLBACKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_GUESSED = 1024  # a bit of general.file_type: the writer did not know
# File types that quantkit does not write: number -> name and the type of most tensors.
_OTHERS = {
    10: ("Q2_K", "Q2_K"),
    19: ("IQ2_XXS", "IQ2_XXS"),
    20: ("IQ2_XS", "IQ2_XS"),
    21: ("Q2_K_S", "Q2_K"),
    22: ("IQ3_XS", "IQ3_S"),
    23: ("IQ3_XXS", "IQ3_XXS"),
    24: ("IQ1_S", "IQ1_S"),
    26: ("IQ3_S", "IQ3_S"),
    27: ("IQ3_M", "IQ3_S"),
    28: ("IQ2_S", "IQ2_XS"),
    29: ("IQ2_M", "IQ2_S"),
    31: ("IQ1_M", "IQ1_M"),
    36: ("TQ1_0", "TQ1_0"),
    37: ("TQ2_0", "TQ2_0"),
    40: ("Q1_0", "Q1_0"),
    41: ("Q2_0", "Q2_0"),
}
MIXES = {number: (name, name.removesuffix("_MOE")) for name, number in FILE_TYPES.items()} | _OTHERS
for _number, (_name, _base) in list(MIXES.items()):
    if _base not in GGML_TYPES:  # Q4_K_M -> Q4_K
        MIXES[_number] = (_name, _base.rpartition("_")[0])


def matrices(file: GgufFile) -> list[GgufTensor]:
    """The tensors that are quantized: not norms and biases, not what chooses experts."""
    return [
        tensor
        for name, tensor in file.tensors.items()
        if len(tensor.shape) > 1 and name.endswith(".weight") and "norm" not in name and "ffn_gate_inp" not in name
    ]


def mix_name(file: GgufFile) -> str | None:
    """What general.file_type calls the mix of types; None where there is none, or one that is not known."""
    number = file.metadata.get("general.file_type")
    known = MIXES.get(number & ~_GUESSED) if isinstance(number, int) else None
    return known[0] if known else None


def check_types(file: GgufFile) -> list[Finding]:
    """Types that nothing multiplies with, and vectors that are not float32."""
    found = []
    weights = {tensor.name for tensor in matrices(file)}
    wrong = [name for name in weights if file.tensors[name].type in _NO_WEIGHTS]
    if wrong:
        message = f"{file.tensors[min(wrong)].type} is no type of weights"
        found.append(error("gguf-type", some(sorted(wrong)), message, "quantize the original model again"))
    vectors = [
        name
        for name, tensor in file.tensors.items()
        if name not in weights and tensor.type != "F32" and "ffn_gate_inp" not in name
    ]
    if vectors:
        message = f"it is {file.tensors[vectors[0]].type}, and llama.cpp adds and multiplies vectors in F32 alone"
        found.append(error("gguf-type", some(vectors), message, "convert the model again"))
    return found


def check_file_type(file: GgufFile) -> list[Finding]:
    """A general.file_type that says other types than the matrices have, and keys that go with quantized ones."""
    found, key = [], "general.file_type"
    number = file.metadata.get(key)
    blocks = [tensor for tensor in matrices(file) if tensor.name.startswith("blk.")] or matrices(file)
    quantized = any(tensor.type not in FLOATS for tensor in blocks)
    if quantized and number is None:
        message = "no key says which mix of types this is: programs show none"
        found.append(info("gguf-file-type", key, message, "the tensors' own types count"))
    elif number is not None and (not isinstance(number, int) or number & ~_GUESSED not in MIXES):
        message = f"{number!r} is the number of no mix of types"
        found.append(warning("gguf-file-type", key, message, "the tensors' own types count"))
    elif isinstance(number, int) and not number & _GUESSED and (lie := _lie(blocks, *MIXES[number])):
        found.append(warning("gguf-file-type", key, lie, "the tensors' own types count; programs show the key"))
    if quantized and file.metadata.get("general.quantization_version") != 2:
        message = "it is not 2, which files with quantized tensors state"
        found.append(warning("gguf-version", "general.quantization_version", message, "quantize it again"))
    return found


def check_rows(file: GgufFile) -> list[Finding]:
    """Matrices that have other types because their rows are no multiple of 256."""
    number = file.metadata.get("general.file_type")
    base = MIXES[number][1] if isinstance(number, int) and number in MIXES else None
    uneven = [tensor for tensor in matrices(file) if tensor.shape[-1] % 256 and tensor.type not in FLOATS]
    if not uneven or (base is not None and GGML_TYPES[base].columns < 256):
        return []
    if base is None and all(GGML_TYPES[tensor.type].columns < 256 for tensor in matrices(file)):
        return []
    columns = sorted({tensor.shape[-1] for tensor in uneven})
    types = ", ".join(sorted({tensor.type for tensor in uneven}))
    message = (
        f"{len(uneven)} matrices have rows of {', '.join(map(str, columns[:3]))} columns, no multiple of 256, which "
        f"k-quants need: they are {types}, and the file is larger than its name says"
    )
    return [info("gguf-rows", uneven[0].name, message, "that is the rule of llama.cpp's quantizer as well")]


def _lie(blocks: list[GgufTensor], name: str, base: str) -> str | None:
    """What is there in place of the mix's own type, where more weights have that than the mix's; None where none."""
    held: Counter[str] = Counter()
    own = 0
    for tensor in blocks:
        size = 1
        for count in tensor.shape:
            size *= count
        expected = _on_rows(base, tensor.shape[-1])
        own += size if tensor.type == expected else 0
        held[tensor.type] += size if tensor.type != expected else 0
    (most, size), total = held.most_common(1)[0] if held else ("", 0), own + sum(held.values())
    if size <= own or not total or (name == "MXFP4_MOE" and own):
        return None
    return f"it says {name}, but {size / total:.0%} of the blocks' weights are {most}"


def _on_rows(type_name: str, columns: int) -> str:
    """The type a mix gives to rows of so many columns in place of its own."""
    if columns % GGML_TYPES[type_name].columns == 0:
        return type_name
    other = FALLBACKS.get(type_name, "F16")
    return other if columns % GGML_TYPES[other].columns == 0 else "F16"
