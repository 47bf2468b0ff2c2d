"""What a run, a plan and a verdict look like.

console.py  every table the command prints
"""
