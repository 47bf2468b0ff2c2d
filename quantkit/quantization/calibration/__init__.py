"""What is gathered from the calibration text while blocks run.

data.py            texts to tokens
records.py  files, folders and Hub data sets as rows
hidden_states.py   the states between two blocks, for all samples
block_calls.py     what batches give to blocks beside the states
spill.py           arrays in memory or in files
statistics.py      sums over the inputs of linears
staged_forward.py  one run of a block that pauses before each group of linears
input_ranges.py    static ranges of linears' inputs
kv_scales.py       static scales of cached keys and values
"""
