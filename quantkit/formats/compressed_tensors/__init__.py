"""compressed-tensors: every scheme, several in one folder.

tensors.py  codes and scales as its tensors
headers.py  which tensors there are, without torch
config.py   schemes as its quantization_config
"""
