"""Quantized folders as transformers models. Start in load.py.

load.py             the model of a folder
early_checks.py     refusals of generation before torch is imported
generation.py       text from one prompt, or from the turns of a chat
gguf_model.py       the model of a GGUF file, decoded
gguf_tokenizer.py   its tokenizer, from the file's keys or from the folder it lies in
save.py             a loaded model written again
quant_linear.py     a linear that keeps its weight packed
definition.py       what a quantized linear computes, in float64: every kernel keeps it
kernel_choice.py    which kernel a linear runs on
fused_experts.py    inputs of experts that transformers keeps in one parameter
engine/             the paged runtime: many requests at a time, over a cache of blocks, plain or quantized
quantized_cache.py  caches that round keys and values as an engine's would
"""
