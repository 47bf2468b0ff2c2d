"""Evaluation of model folders: perplexity on a text, and divergence from the model one was made from.

evaluation.py  both, for a folder and its original
perplexity.py  log-probabilities of a text, window by window
divergence.py  KL and agreement
bootstrap.py   confidence intervals
folders.py     opens the folders that are compared
tables.py      the results as tables
search/        several recipes side by side
"""

from quantkit_eval.evaluation import evaluate
from quantkit_eval.tables import TABLE_HEADER, render, table_row

__all__ = ["TABLE_HEADER", "evaluate", "render", "table_row"]
