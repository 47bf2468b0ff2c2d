"""Tasks of lm-eval: what a model answers, and what of the original's answers is left.

task_files.py  where task files lie, and whether they are YAML
selection.py   tasks by name, loaded
run.py         a model and its original on tasks
comparison.py  two models on the same questions: differences, flips, verdict
results.py     what was found, as dataclasses that become JSON once
tables.py      the results as a table
command.py     lm-eval's own command with our model registered
"""
