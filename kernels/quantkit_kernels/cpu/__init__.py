"""Quantized linears and decode attention on a CPU. Needs torch alone; see `linear` and `attention`.

M tokens, N out features, K in features, G groups of a row.
"""
