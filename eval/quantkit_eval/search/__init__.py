"""Several recipes side by side.

sweep.py  a row per recipe: KL, agreement, perplexity, bits, seconds
"""
