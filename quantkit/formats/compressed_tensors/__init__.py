"""compressed-tensors: every scheme, several in one folder.

tensors.py  codes and scales as its tensors
config.py   schemes as its quantization_config
"""
