"""What the verbs on a folder refuse before torch is imported: a mistake is answered in a fraction of a second."""

from pathlib import Path

from quantkit.checkpoint.gguf_path import open_found
from quantkit.checkpoint.model_folder import other_kind
from quantkit.checkpoint.output_folder import check_output
from quantkit.checkpoint.quantization_config import quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.paths import user_path


def check_conversion(source: Path, output: Path) -> Checkpoint:
    """The opened folder `source`; UserError where it is not a quantized model, or `output` cannot be made."""
    check_output(output)
    checkpoint = Checkpoint.open(source)
    check_output(output, checkpoint.folder)
    if quantization_config(checkpoint) is None:
        raise UserError(f"{source}: this model is not quantized\nhint: `quantkit quantize` does that")
    return checkpoint


def check_verifiable(path: Path) -> None:
    """UserError for a path that is neither a model folder nor a GGUF file; a damaged folder is for the verdict."""
    if open_found(path) is None and (found := other_kind(user_path(path))) is not None:
        raise UserError(f"{path}: {found}")
