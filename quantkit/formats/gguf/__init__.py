"""GGUF: the file of llama.cpp. Its container is the gguf package's; names, types and tokenizers are decided here.

architectures.py  one table per architecture: names of its tensors, what llama.cpp computes, transformers' defaults
config_checks.py  settings of config.json that llama.cpp does not compute: refused by name
rope.py           rotary embeddings: config.json -> keys and tensors, and back
tensor_names.py   checkpoint tensor -> its place in the file, and back
metadata.py       config.json -> keys of the file, and back
described_file.py a file as the checkpoint it was made from
mixes.py          which type each tensor has, by the names llama-quantize knows
"""
