"""The model's structure, found by running it; quantization is not known here. Start in streamed_model.py.

model_ends.py      what surrounds the blocks: to the first one, from the last one to the logits
meta_model.py      a config as a model without weights, and its decoder blocks
streamed_model.py  the model with one block filled at a time, and what reaches each block
block_trial.py     each distinct kind of block, run once to be looked at
block_arguments.py what blocks write into, and copies of it
weight_sources.py  which checkpoint tensors a parameter is made of
expert_stacks.py   experts that a checkpoint keeps in one tensor per layer, cut and put together
module_checkpoint.py  a module in memory as a checkpoint
ties.py            which parameters share one tensor
matmul_tracing.py  which weight meets which input, seen as it happens
block_graph.py     the graph of a block: its matrices, which share an input, which folds hold
routing.py         which matrices are routers: outputs that are ranked or indexed, one row per expert
folds.py           one fold: scales moved from a producer into its readers, and the proof of it
every_expert.py    every token through every expert, for what calibration sees
fold_search.py     all folds of a block, found and proved
"""
