"""What a report of a quantized folder is measured with. Start in build.py.

build.py              a folder's report: what is stored, measured and written
side_by_side.py       greedy continuations of both models, and their speed
original_outliers.py  the largest weights and inputs of the original
task_results.py       results of tasks, from a file
files.py              where a report is written, and what is never overwritten
"""
