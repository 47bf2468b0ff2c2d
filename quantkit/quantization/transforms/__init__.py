"""Rewrites of weights that keep the model's function, applied before quantization.

scale_folding.py    AWQ and SmoothQuant on proven folds
rotation.py         one rotation of the residual stream for the whole model
rotation_search.py  which matrices of a block rotate, found by running it, and the proof
"""
