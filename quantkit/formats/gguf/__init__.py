"""GGUF: the file of llama.cpp. Its container is the gguf package's; names, types and tokenizers are decided here.

mixes.py  which type each tensor has, by the names llama-quantize knows
"""
