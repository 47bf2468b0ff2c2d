"""What a folder's files say about its quantization: the one place where that is read.

A description is `quantization_config` (or the older `compression_config`) of config.json or of its text_config, where
null means absent, or one of the files in SIDE_FILES. No number format is known here; what the settings mean is up to
their reader.
"""

import re
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.header import DTYPES, TensorInfo, read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError

OWN_CACHE = "quantkit_kv_cache"  # key of config.json: a KV cache that no engine's format can describe
CHANNEL_NAMES = ("k_channels", "v_channels")  # tensors of such a cache within an attention module
INLINE_KEYS = ("quantization_config", "compression_config")
# The methods each file may belong to; the first is meant where the file names none.
SIDE_FILES = {
    "hf_quant_config.json": ("modelopt",),
    "quant_config.json": ("awq",),
    "quantize_config.json": ("gptq", "awq"),
}
# The same setting under the names that different writers give it; all are compared between two descriptions.
SETTINGS = {
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "zero_point": ("zero_point",),
    "checkpoint_format": ("checkpoint_format",),
    "quant_algo": ("quant_algo",),
}
BUFFERS = ("bias", "mask")  # ends of the names of 8-bit tensors that older plain models store
PACKED_NAMES = ("qweight", "qzeros", "weight_packed", "SCB", "W_q")
# What follows "_" after the name of a parameter, and what stands beside a module's weight.
AFTER_WEIGHT = re.compile(
    r"(?P<stem>.+)(?:_(?:scales?|scale_inv|scale_2|global_scale|zeros?|zero_points?|packed|blocks)"
    r"|\.(?:absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+))"
)
BESIDE_WEIGHT = re.compile(
    r"(?P<stem>.+)\.(?:scales?|scale_inv|zeros?|zero_points?|input_scale|input_zero_point|input_global_scale)"
)


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The settings that describe how the folder is quantized, with a string quant_method; None for a plain model.

    UserError where a description is malformed, where two contradict each other, and where tensors are stored quantized
    but nothing describes them: read as plain weights they would be wrong.
    """
    found = list(descriptions(checkpoint).items())
    for where, settings in found[1:]:
        if difference := _difference(found[0][1], settings):
            raise UserError(
                f"{checkpoint.folder}: {found[0][0]} and {where} contradict each other: {difference}; "
                "delete or correct the one that does not belong to these weights"
            )
    if found:
        return found[0][1]
    if name := quantized_tensor(checkpoint.tensors):
        info = checkpoint.tensors[name]
        raise UserError(
            f"{checkpoint.folder}: {name} ({DTYPES[info.tag][0]} {list(info.shape)}) belongs to a quantized weight, "
            f"but nothing describes its codes and scales: neither quantization_config of config.json nor "
            f"{', '.join(SIDE_FILES)}; restore the description, or use the original model"
        )
    return None


def descriptions(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Where -> settings with a string quant_method, of every description in the folder, config.json's first.

    UserError for one that is not an object, cannot be read, or names no method.
    """
    folder, inner = checkpoint.folder, checkpoint.config.get("text_config")
    found: dict[str, dict[str, Any]] = {}
    if mlx := _is_mlx(checkpoint.config.get("quantization")):
        found["quantization of config.json"] = checkpoint.config["quantization"] | {"quant_method": "mlx"}
    for prefix, config in (("", checkpoint.config), ("text_config.", inner if isinstance(inner, dict) else {})):
        for key in INLINE_KEYS:
            if (settings := config.get(key)) is not None and not (mlx and _is_mlx(settings)):
                where = f"{prefix}{key} of config.json"
                found[where] = _with_method(settings, f"{folder}: {where}", _implied(settings, key))
    inline = next((settings["quant_method"] for settings in found.values()), None)
    for name, methods in SIDE_FILES.items():
        if (folder / name).exists() and (settings := read_json(folder / name, "")):
            found[name] = _with_method(settings, str(folder / name), inline if inline in methods else methods[0])
    return found


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """UserError where the folder is quantized already: quantizing needs original weights."""
    if settings := quantization_config(checkpoint):
        where = next(iter(descriptions(checkpoint)))
        raise UserError(
            f"{checkpoint.folder} is already quantized ({settings['quant_method']}, according to {where}): it holds "
            "codes and scales; start from the original model"
        )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without any description of a quantization."""
    plain = {key: value for key, value in config.items() if key not in INLINE_KEYS}
    if isinstance(inner := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in inner.items() if key not in INLINE_KEYS}
    return plain


def quantized_tensor(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor that no plain model has: 8-bit or integer weights, packed codes, or a scale beside a weight."""
    for name, info in tensors.items():
        leaf, integer = name.rpartition(".")[2], not info.is_float and info.tag != "C64"
        if info.itemsize == 1 and not integer:
            return name
        matrix = integer and len(info.shape) >= 2 and info.tag != "BOOL"
        if matrix and (leaf == "weight" or (info.itemsize == 1 and not leaf.endswith(BUFFERS))):
            return name
        if leaf in PACKED_NAMES:
            return name
        after, beside = AFTER_WEIGHT.fullmatch(name), BESIDE_WEIGHT.fullmatch(name)
        if after and (after["stem"] in tensors or after["stem"].endswith("weight")):
            return name
        if beside and len(tensors[weight].shape if (weight := f"{beside['stem']}.weight") in tensors else ()) >= 2:
            return name
    return None


def _implied(settings: Any, key: str) -> str | None:
    """The method that settings without quant_method can only mean."""
    if key == "compression_config":
        return "compressed-tensors"
    if not isinstance(settings, dict):
        return None
    if "quant_algo" in settings or "quantization" in settings:
        return "modelopt"
    return "bitsandbytes" if settings.get("load_in_8bit") or settings.get("load_in_4bit") else None


def _is_mlx(settings: Any) -> bool:
    """MLX writes the same two numbers under `quantization` and, in later versions, under `quantization_config`."""
    return isinstance(settings, dict) and "quant_method" not in settings and {"bits", "group_size"} <= settings.keys()


def _with_method(settings: Any, where: str, implied: str | None) -> dict[str, Any]:
    """The settings with the quant_method that they name or imply."""
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise UserError(f"{where} is a {kind}, expected an object or null; restore it, or remove it from a plain model")
    method = settings.get("quant_method", implied)
    if not isinstance(method, str) or not method:
        found = "there is none" if method is None else f"it is {method!r}"
        raise UserError(
            f"{where} must name its quant_method as a string, but {found}; restore it, or remove the description from "
            "a plain model"
        )
    return settings | {"quant_method": method}


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What two descriptions say differently, in words; None where they agree on all that both say."""
    methods = [str(settings["quant_method"]).lower().partition("_")[0] for settings in (one, other)]
    if methods[0] != methods[1]:
        return f"quant_method is {one['quant_method']} and {other['quant_method']}"
    for setting, names in SETTINGS.items():
        values = [
            next((part[name] for part in _parts(settings) for name in names if part.get(name) is not None), None)
            for settings in (one, other)
        ]
        if None not in values and values[0] != values[1]:
            return f"{setting} is {values[0]!r} and {values[1]!r}"
    return None


def _parts(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = settings.get("quantization")
    return [settings, inner] if isinstance(inner, Mapping) else [settings]
