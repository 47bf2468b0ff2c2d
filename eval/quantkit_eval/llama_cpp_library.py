"""A GGUF file run by llama.cpp itself, through llama-cpp-python: the logits of an engine, its rounding included."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from quantkit.errors import RunError
from quantkit_eval.early_checks import check_installed


class LlamaCppModel:
    """A model that is called like one of transformers: `input_ids` int64 [B, T] in, `.logits` float32 [B, T, V] out."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, path: Path, context: int) -> None:
        """Load a file for windows of up to `context` tokens; RunError where llama.cpp refuses it."""
        check_installed()
        try:
            import llama_cpp as api  # pyright: ignore[reportMissingImports]
        except Exception as error:  # a library that is missing, or built for another machine
            raise RunError(
                f"llama-cpp-python does not load: {str(error).splitlines()[0]}\nhint: install it again"
            ) from error
        self._api: Any = api
        self.version = str(getattr(api, "__version__", "?"))
        self._quiet = api.llama_log_callback(lambda *_: None)  # kept: C code calls it for as long as the model lives
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        # Rows as they lie in the file: weights that are arranged again for some processors give the same products.
        settings.use_extra_bufts = False
        settings.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RunError(
                f"{path}: llama.cpp does not load this file\nhint: `quantkit verify --engine llama.cpp` says why"
            )
        sizes = api.llama_context_default_params()
        sizes.n_ctx = sizes.n_batch = context
        sizes.n_threads = sizes.n_threads_batch = torch.get_num_threads()
        self._context = api.llama_init_from_model(self._model, sizes)
        if not self._context:
            raise RunError(f"{path}: llama.cpp has no room for {context} tokens\nhint: take a smaller --context")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(context, 0, 1)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=self._vocabulary))

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """The logits of every position, each window from an empty cache."""
        logits = [torch.from_numpy(self._window(ids)) for ids in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack(logits))

    def _window(self, ids: list[int]) -> np.ndarray:
        """float32 [T, V] of one window."""
        api, batch = self._api, self._batch
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if (code := api.llama_decode(self._context, batch)) != 0:
            raise RunError(f"llama.cpp stopped with code {code} while it ran a window of {len(ids)} tokens")
        shape = (len(ids) * self._vocabulary,)
        return np.ctypeslib.as_array(api.llama_get_logits(self._context), shape).reshape(len(ids), -1).copy()

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)
