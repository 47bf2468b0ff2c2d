"""Evaluation of model folders: perplexity on a text, and divergence from the model one was made from."""

from quantkit_eval.evaluation import evaluate
from quantkit_eval.tables import TABLE_HEADER, render, table_row

__all__ = ["TABLE_HEADER", "evaluate", "render", "table_row"]
