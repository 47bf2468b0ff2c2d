"""What a run, a plan and a verdict look like.

records.py  the lines of a run's report
console.py  every table the command prints
"""
