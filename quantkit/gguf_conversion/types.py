"""Which GGUF type each tensor of a folder gets: decided from headers, before anything is written."""

from collections.abc import Mapping

from quantkit.checkpoint.gguf_writer import KeyValue
from quantkit.errors import UserError
from quantkit.formats.gguf.carry_over import carried_type
from quantkit.formats.gguf.mixes import bytes_of, file_type_of, fitting_type, quantizable, tensor_types
from quantkit.formats.gguf.tensor_names import Place
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, STORED
from quantkit.gguf_conversion.choices import Choices
from quantkit.gguf_conversion.source import SourceFolder

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROUND = "hint: pass --requantize q4_k_m, or another mix, to decode the weights and round them again"
CARRIED = "int4 and int8 in symmetric groups of 32, MXFP4 and NVFP4"

Parts = Mapping[str, list[tuple[str, Place]]]  # GGUF tensor -> the checkpoint's tensors that make it


def parts_of(places: Mapping[str, Place]) -> dict[str, list[tuple[str, Place]]]:
    """GGUF tensor -> (tensor of the checkpoint, its place), experts in their order."""
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        parts.setdefault(place.tensor, []).append((name, place))
    for members in parts.values():
        members.sort(key=lambda member: member[1].expert or 0)
    return parts


def choose_types(
    source: SourceFolder,
    parts: Parts,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, KeyValue],
    architecture: str,
    choices: Choices,
) -> dict[str, str]:
    """The type of every GGUF tensor in `shapes`; UserError where a format has none and nothing may be rounded."""
    if choices.output_type is not None and HEAD not in parts:
        raise UserError(
            "--output-type: the head of this model is the embedding table\nhint: pass --token-embedding TYPE"
        )
    if choices.requantize is not None:
        return tensor_types(
            choices.requantize,
            shapes,
            architecture=architecture,
            metadata=metadata,
            imatrix=False,
            token_embedding=choices.token_embedding,
            output=choices.output_type,
        )
    _refuse_cache(source)
    types = dict.fromkeys(shapes, "F32")
    refused: dict[str, list[str]] = {}
    for tensor, members in parts.items():
        found = {_as_stored(source, name, tensor, shapes[tensor]) for name, _ in members}
        wanted = {EMBEDDING: choices.token_embedding, HEAD: choices.output_type}.get(tensor)
        if wanted is not None:
            types[tensor] = fitting_type(wanted, shapes[tensor][-1])
        elif len(found) == 1 and (type_ := next(iter(found))) is not None:
            types[tensor] = type_
        else:
            schemes = {str(source.scheme(name) or "dense") for name, _ in members}
            refused.setdefault(" and ".join(sorted(schemes)), []).append(members[0][0])
    if refused:
        lines = [f"{names[0]}{_more(names)}: {scheme}" for scheme, names in refused.items()]
        raise UserError(
            f"{source.checkpoint.folder}: no GGUF type holds these weights as they are: {'; '.join(lines)}; "
            f"{CARRIED} can be carried over\n{ROUND}"
        )
    return types


def file_type(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], choices: Choices) -> int:
    """general.file_type: of the mix, else of the type that most weights of the blocks have."""
    if choices.requantize is not None:
        return FILE_TYPES[choices.requantize]
    blocks = {name: type_ for name, type_ in types.items() if name.startswith("blk.")}
    return file_type_of({name: _family(type_) for name, type_ in (blocks or types).items()}, shapes)


def remarks(
    source: SourceFolder, types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], choices: Choices
) -> list[str]:
    """What the file does not hold of the folder, and what of it could be smaller."""
    found = []
    inputs = {
        str(s.activations) for s in source.schemes.values() if s.activations and carried_type(s.weights) != "NVFP4"
    }
    if inputs:
        found.append(f"inputs rounded to {', '.join(sorted(inputs))}: not in the file, llama.cpp rounds them itself")
    sizes = {name: bytes_of(types[name], shape) for name, shape in shapes.items()}
    table, whole = sizes[EMBEDDING], sum(sizes.values())
    smaller = bytes_of(fitting_type("Q6_K", shapes[EMBEDDING][-1]), shapes[EMBEDDING])
    if choices.requantize is None and source.quantized is not None and table - smaller > whole / 8:
        found.append(
            f"{EMBEDDING} is {table / 1e6:.1f} of {whole / 1e6:.1f} MB, as stored ({types[EMBEDDING]}); "
            f"--token-embedding q6_k makes it {smaller / 1e6:.1f} MB"
        )
    return found


def _family(type_: str) -> str:
    return {"MXFP4": "MXFP4_MOE"}.get(type_, type_)  # the one number there is for files of MXFP4


def _as_stored(source: SourceFolder, name: str, tensor: str, shape: tuple[int, ...]) -> str | None:
    """The type that holds a tensor of the checkpoint as it is; None where there is none."""
    scheme = source.scheme(name)
    if scheme is None:
        return STORED.get(source.checkpoint.info(name).tag) if quantizable(tensor, shape) else "F32"
    type_ = carried_type(scheme.weights)
    return type_ if type_ is not None and shape[-1] % GGML_TYPES[type_].columns == 0 else None


def _refuse_cache(source: SourceFolder) -> None:
    cache = None if source.quantized is None else source.quantized.cache
    if cache is not None and cache.calibrated:
        raise UserError(
            f"{source.checkpoint.folder}: the KV cache is described as {cache}; a GGUF file has no place "
            f"for its scales, llama.cpp is told the cache's type when it starts\n{ROUND} and leave the scales out"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
