"""Several recipes side by side: `quantkit sweep`. Start in sweep_run.py.

sweep_run.py      from options to results
options.py        what is asked for, and what is refused before torch is imported
grid.py           all combinations of a grid, checked
planned.py        what each run will take here
identity.py       what a row depends on, as hashes
sweep_folder.py   the folder: whose it is, rows, models
runs.py           runs side by side, a process each
run_worker.py     such a process
ray_runs.py       runs as tasks of Ray
results.py        rows, results.parquet and results.csv
front.py          the Pareto front and its plot
tables.py         the results as tables
search_space.py   what a search may choose
optuna_search.py  a search by Optuna
sweep.py          recipes given by name, in one process: how the README's figures are made
"""
