"""A model and a recipe become a quantized folder. Start in pipeline.py.

pipeline.py          the straight line: targets, blocks one by one, report
early_checks.py      what is refused before torch is imported
targets.py           what is done to each linear, decided before any work; the files' layout
run_context.py       what a run, and one of its blocks, consist of
block_quantizer.py   one block: transform, quantize, calibrate the cache, pass on, write the rest
head.py              the output head as one more linear
held_out.py          the quantized model beside the original on text it was not calibrated on
block_files.py       the output's tensors: copied, written, read back
linear_quantizer.py  the linears that share one input
dense_modules.py     what stays dense, by the checkpoint's names
output_layout.py     what the output will hold
gguf_budget.py       the bytes that a measured mix may take
gguf_checks.py       what is refused of a GGUF recipe before torch is imported
gguf_importance.py   the importance matrix that a GGUF recipe names
gguf_keys.py         all keys of a GGUF file
gguf_layout.py       what a GGUF file will hold: names, types, metadata
gguf_output.py       its writing and reading under the checkpoint's names
gguf_measured.py     measured mixes in a run: the whole model, and the types that come of it
gguf_tables.py       its embedding and head
gguf_allocation.py   the harm of each tensor in each type, and the types that do least
gguf_weights.py      its tensors in a model, rounded to types
output_divergence.py how far a changed model's output is from the original's
knapsack.py          the exact choice of types for a number of bytes
engine_check.py      asks the engine named in the recipe, before and after
output.py            config.json and the report
resources.py         seconds by stage, memory, worker threads
imatrix.py           importance matrices for llama.cpp's tools
allocation/          a number format for each linear, for a given size
calibration/         what is gathered from the calibration text
transforms/          rewrites of weights that keep the model's function
"""
