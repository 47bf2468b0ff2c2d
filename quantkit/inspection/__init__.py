"""What a model holds, from its headers alone: no weight is read, no torch imported.

folder.py     a model folder
gguf_file.py  a GGUF file
"""

from pathlib import Path
from typing import Any

from quantkit.checkpoint.gguf_path import open_found

__all__ = ["inspect_folder"]


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """What a model folder or a GGUF file holds, as plain data; UserError for what is neither, or damaged."""
    if (file := open_found(path)) is not None:
        from quantkit.inspection.gguf_file import inspect_gguf

        return inspect_gguf(file).to_json()
    from quantkit.inspection.folder import inspect_checkpoint

    return inspect_checkpoint(path)
