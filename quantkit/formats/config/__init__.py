"""What each format's quantization_config says, and which tensors belong to it, without torch.

awq.py gptq.py fp8.py modelopt.py   one module per format; that of compressed-tensors lies beside its tensors
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from quantkit.formats.common import Headers, Stored
from quantkit.formats.compressed_tensors import headers as compressed_tensors
from quantkit.formats.config import awq, fp8, gptq, modelopt
from quantkit.types import KVSpec, Scheme


class FormatConfig(Protocol):
    """What a format is without its tensors; the names are explained where the whole format is declared."""

    @property
    def MARK(self) -> str: ...  # noqa: N802

    @property
    def SUFFIXES(self) -> Sequence[str]: ...  # noqa: N802

    @property
    def KV_NAMES(self) -> tuple[str, str] | None: ...  # noqa: N802

    def stored(self, shape: tuple[int, int], scheme: Scheme, scale_tag: str | None) -> Stored:
        """Suffix -> (dtype, shape) of the tensors of a weight (N, K); UserError where the format cannot hold it."""
        ...

    def shape_of(self, tensors: Headers, scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module; UserError where one of its tensors does not fit the scheme."""
        ...

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]: ...

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]: ...

    def read_config(self, quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]: ...

    def read_kv(self, quantization_config: Mapping[str, Any]) -> KVSpec | None: ...


CONFIGS: dict[str, FormatConfig] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq.V1,
    "gptq_v2": gptq.V2,
    "fp8": fp8.BLOCKS,
    "fp8_tensor": fp8.TENSOR,
    "modelopt": modelopt,
}


def format_name(quantization_config: Mapping[str, Any]) -> str | None:
    """Which of CONFIGS a quantization_config describes (several share a quant_method); None: none of them."""
    method = quantization_config.get("quant_method")
    if method == "gptq":
        method = quantization_config.get("checkpoint_format") or "gptq"
    elif method == "fp8" and not quantization_config.get("weight_block_size"):
        method = "fp8_tensor"
    elif isinstance(method, str) and method.startswith("modelopt"):
        method = "modelopt"  # some writers say modelopt_fp4
    return method if method in CONFIGS else None
