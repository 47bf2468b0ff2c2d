"""What a folder says of its quantization, wherever it says so."""

from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError

OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}

OWN_CACHE = "quantkit_kv_cache"  # in config.json: a cache that no engine's format speaks of


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """quantization_config, or what older writers put into a file of its own; UserError where there is neither."""
    settings = checkpoint.config.get("quantization_config")
    if isinstance(settings, dict):
        return settings
    for name, method in OLDER.items():
        if (checkpoint.folder / name).exists():
            return {"quant_method": method} | read_json(checkpoint.folder / name, "")
    raise UserError(f"{checkpoint.folder}: this model is not quantized; quantkit quantize does that")
