"""What a run, a plan and a verdict look like.

records.py  what a run reports, as dataclasses that become JSON once
plan.py     what a run would take
console.py  every table the command prints
"""
