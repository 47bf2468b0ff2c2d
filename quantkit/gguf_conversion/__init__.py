"""A model folder as a GGUF file. Start in convert.py.

convert.py  a quantized folder with the very same codes and scales, a dense one as stored, or either rounded again
choices.py  what a user may choose, checked without torch
source.py   what a folder holds: tensors of the plain checkpoint, packed or not
types.py    which GGUF type each tensor gets; what cannot be carried over is refused before any work
"""
