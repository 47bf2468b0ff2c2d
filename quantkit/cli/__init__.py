"""The `quantkit` command: one function per verb, no logic. Start in main.py.

main.py          which function is which verb
app.py           the typer app, errors as messages and exit codes, shared options
usage.py         wrong verbs and options, answered like every other mistake
completion.py    what the shell completes options with
quantize.py      quantize
plan.py          plan
auto.py          auto
evaluate.py      eval
report.py        report
generate.py      generate
bench.py         bench
sweep.py         sweep
push.py          push
folders.py       inspect, convert, verify
imatrix.py       imatrix
lm_eval.py       lm-eval
recipes.py       recipes: list, show, check, schema
recipe_table.py  what each shipped recipe gives and needs
environment.py   env
"""
