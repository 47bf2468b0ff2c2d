"""What is gathered from the calibration text while blocks run. Text becomes tokens in data.py.

data.py            calibration data to token windows
amount.py          how many, where the recipe leaves it to auto
widest.py          the widest linear, which the amount depends on
choice.py          which windows of which source
windows.py         documents and streams to windows
bos.py             whether sequences start with a BOS token
documents.py       rows to texts, chats through the chat template
columns.py         which columns of a row hold the text
given.py           what a Python caller gives
read_sources.py    one source read, and its record for the report
sources.py         where a source lies: file, folder, data set
hub.py             data sets of the Hub
records.py         rows of files: CSV, parquet, arrow
json_rows.py       rows of JSON files
files.py           what a file holds, and its text
hidden_states.py   the states between two blocks, for all samples
block_calls.py     what batches give to blocks beside the states
spill.py           arrays in memory or in files
statistics.py      sums over the inputs of linears
expert_statistics.py  those of a layer's experts, for the ones that few tokens reach
staged_forward.py  one run of a block that pauses before each group of linears
input_ranges.py    static ranges of linears' inputs
kv_scales.py       static scales of cached keys and values
kv_channels.py     offsets and scales of their channels
"""
