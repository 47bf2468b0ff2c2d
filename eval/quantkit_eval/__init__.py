"""Evaluation of models: perplexity on texts, and divergence from the model one was made from.

evaluation.py         both, for a model and its original
results.py            what was found, as dataclasses that become JSON once
acceptance.py         its guesses at what the original generates
cached_model.py       a model with a quantized cache
early_checks.py       refusals before torch is imported
texts.py              files and named texts
paged_model.py        a model run by the paged engine
llama_cpp_library.py  a GGUF file run by llama.cpp
perplexity.py         log-probabilities of a text, window by window
divergence.py         KL and agreement
bootstrap.py          confidence intervals
folders.py            opens the folders that are compared
held_modules.py       modules in memory, left as they were
training.py           a callback of transformers' Trainer: the quantized copy at each save
tables.py             the results as tables
lm_eval_model.py      the model `quantkit` of lm-eval
task_engines.py       what runs it: transformers or the paged engine
prefix_rows.py        rows that hold several continuations of a context
tasks/                tasks of lm-eval, beside the original
bench/                speed, beside transformers and llama.cpp
report/               what a report of a folder is measured with
search/               several recipes side by side

Names are imported on first use: a refusal needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit_eval.evaluation import evaluate
    from quantkit_eval.results import Evaluation, TextResult
    from quantkit_eval.tables import TABLE_HEADER, render, table_row
    from quantkit_eval.training import QuantizedEvaluation

__all__ = ["TABLE_HEADER", "Evaluation", "QuantizedEvaluation", "TextResult", "evaluate", "render", "table_row"]

_HOMES = {
    "TABLE_HEADER": "tables",
    "Evaluation": "results",
    "TextResult": "results",
    "QuantizedEvaluation": "training",
    "evaluate": "evaluation",
    "render": "tables",
    "table_row": "tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit_eval' has no attribute {name!r}")
    return getattr(import_module(f"quantkit_eval.{_HOMES[name]}"), name)
