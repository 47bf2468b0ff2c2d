"""Bytes on disk: no number format and no recipe is known here, only how many bytes a type takes.

reader.py               a checkpoint's tensors, read lazily, one by one or by rows
expert_view.py          a checkpoint whose stacks of experts look like one tensor per expert
writer.py               safetensors files whose every byte has its place before the first tensor exists
header.py               safetensors headers and JSON files, read with bounds checks
gguf_file.py            a GGUF file's keys and tensors, or those of all shards of a model
gguf_path.py            which .gguf file a path means
gguf_header.py          GGUF headers, read with bounds checks
gguf_writer.py          GGUF files, written like the safetensors files above
gguf_values.py          NaN and Inf in the values of a GGUF file
preallocation.py        what both writers share: files reserved up front, resumed, finished
rawio.py                whole reads and writes at an offset
journal.py              what an interrupted run has finished
model_folder.py         what a path given as a model is: a model folder, or something else with a name
model_kind.py           whether a config.json describes a causal language model
hub.py                  finds or downloads a model's folder
hub_upload.py           uploads a folder to the Hub
tokenizer.py            the tokenizer of a model's folder
quantization_config.py  what a folder says of its quantization, wherever it says so
early_checks.py         what the verbs on a folder refuse before torch is imported
output_folder.py        a result's folder: never overwritten; JSON files, side files, hashes
"""
