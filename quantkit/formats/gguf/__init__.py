"""GGUF: the file of llama.cpp. Its container is the gguf package's; names, types and tokenizers are decided here.

architectures.py  one table per architecture: names of its tensors, what llama.cpp computes, transformers' defaults
config_checks.py  settings of config.json that llama.cpp does not compute: refused by name
rope.py           rotary embeddings: config.json -> keys and tensors, and back
tensor_names.py   checkpoint tensor -> its place in the file, and back
metadata.py       config.json -> keys of the file, and back
described_file.py a file as the checkpoint it was made from
tokenizer.py      the tokenizer's keys: byte-level BPE and sentencepiece's BPE
vocabulary.py     a folder's tokenizer: what cuts and merges, its tokens, its added tokens
token_list.py     text and kind of every token, padding included
special_tokens.py  ids of the special tokens, what is put around a text, chat templates
model_name.py     general.name, by which llama.cpp knows a tokenizer of Phi-3
pre.py            which of llama.cpp's pre-tokenizers cuts texts as the tokenizer does
pre_table.py      what each of those does
pre_probe.py      the strings on which they are told apart
spm_scores.py     scores for llama.cpp's sentencepiece tokenizer, which has no merges
sentencepiece_file.py  reader of tokenizer.model
block_bytes.py    bytes of blocks and floats, packed and read
linears.py        quantized linears as tensors of blocks: the interface of formats
described_file.py  a file as the checkpoint it was made from: config.json and names of tensors
carry_over.py     codes and scales of other formats as blocks, unchanged
remarks.py        what a user should know of a file
imatrix.py        importance matrices of llama.cpp's tools, read and written
mixes.py          which type each tensor has, by the names llama-quantize knows
"""
