"""A model run by the paged engine: the logits of a text by the pages, write kernels and attention of generation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quantkit.library_output import quiet_libraries
from quantkit.runtime.engine.llm import LLM


class PagedModel:
    """A model that is called like one of transformers: `input_ids` int64 [B, T] in, `.logits` float32 [B, T, V] out.

    Windows run beside each other as requests do, in steps of `chunk` tokens. kv_cache: as of LLM; None: as the folder
    says. UserError, before weights are read, for a model that the engine does not run.
    """

    def __init__(
        self, folder: Path, context: int | None, device: torch.device, kv_cache: str | None = None, *, chunk: int = 512,
        block_size: int = 64, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        dtype = torch.float32 if device.type == "cpu" else None
        with quiet_libraries():
            self.llm = LLM(
                str(folder), dtype, kv_cache, max_num_batched_tokens=chunk, block_size=block_size,
                max_model_len=context, device=str(device), trust_remote_code=trust_remote_code,
            )  # fmt: skip
        self.device, self.config, self.dtype = device, self.llm.runner.model.config, self.llm.runner.model.dtype
        self.remark = (
            f"the paged engine computed the logits, in steps of {chunk} tokens on blocks of {block_size}, "
            f"weights in {str(self.dtype).removeprefix('torch.')} where they are not quantized"
        )

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        """The logits of every position."""
        parts: list[list[Tensor]] = [[] for _ in input_ids]  # of each window, in the order of its tokens
        self.llm.logits(input_ids.tolist(), lambda index, start, rows_RV: parts[index].append(rows_RV))
        return SimpleNamespace(logits=torch.stack([torch.cat(rows) for rows in parts]))
