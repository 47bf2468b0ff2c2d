"""What a folder holds, quantized or not: the tensors of the plain checkpoint, by name, a part at a time.

Shapes: N = out features, K = in features of a linear.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from quantkit.checkpoint.gguf_writer import KeyValue
from quantkit.checkpoint.quantization_config import quantization_config, quantized_tensor, without_quantization
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.gguf.metadata import origin
from quantkit.formats.quantized_folder import QuantizedFolder
from quantkit.grids.dequantize import dequantize
from quantkit.model.streamed_model import check_finite
from quantkit.report.records import REPORT
from quantkit.types import QuantizedWeight, Scheme


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """checkpoint: its files; quantized: the folder as its format describes it, None where it is a dense one.

    shapes  of the tensors of the plain checkpoint: those of packed weights, and all others but scales of a KV cache
    """

    checkpoint: Checkpoint
    quantized: QuantizedFolder | None
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Self:
        """The configuration and the headers, compared; UserError for whatever is wrong with them."""
        if quantization_config(checkpoint) is None:
            if odd := quantized_tensor(checkpoint.tensors):
                raise UserError(
                    f"{checkpoint.folder}: {odd} is stored quantized, but nothing describes how\nhint: see config.json"
                )
            return cls(checkpoint, None, {name: info.shape for name, info in checkpoint.tensors.items()})
        quantized = QuantizedFolder.open(checkpoint)
        shapes = {name: shape for name, shape in quantized.shapes().items() if not quantized.of_cache(name)}
        return cls(checkpoint, quantized, shapes)

    @property
    def format(self) -> str:
        """The format's name; "dense" for a folder that is not quantized."""
        return "dense" if self.quantized is None else self.quantized.name

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the plain model."""
        return without_quantization(self.checkpoint.config)

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Scheme of each quantized module."""
        return {} if self.quantized is None else self.quantized.schemes

    def made_by(self) -> dict[str, KeyValue]:
        """The keys `origin` makes of a folder's report; none where the folder is not ours, or was converted."""
        try:
            report = json.loads((self.checkpoint.folder / REPORT).read_text(encoding="utf-8"))
            recipe, calibration = report["recipe"], report.get("calibration")
            settings = {key: value for key, value in recipe.items() if key not in ("model", "calibration")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another tool's, or converted
            return {}
        return origin(settings, calibration)

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a plain tensor that is stored packed; None for any other."""
        return self.schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def packed(self, name: str) -> QuantizedWeight:
        """The codes and scales of a plain tensor that is stored packed."""
        assert self.quantized is not None, "only a quantized folder has packed tensors"
        return self.quantized.weight(name.removesuffix(".weight"))

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows (int64 index) of a dense matrix as stored; UserError for NaN and infinite numbers."""
        found = self.checkpoint.rows(name, index)
        check_finite(found, name)
        return found

    def vector(self, name: str) -> Tensor:
        """A dense vector as stored; UserError for NaN and infinite numbers."""
        found = self.checkpoint.read(name)
        check_finite(found, name)
        return found

    def decoded(self, name: str) -> Tensor:
        """The weight [N, K], float32, of a plain tensor that is stored packed."""
        q = self.packed(name)
        return dequantize(replace(q, scale_NG=q.scale_NG.float()))
