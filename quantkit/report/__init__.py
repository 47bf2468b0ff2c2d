"""What a run, a plan and a verdict look like.

records.py  what a run reports, as dataclasses that become JSON once
console.py  every table the command prints
"""
