"""What a run, a plan and a verdict look like.

records.py            what a run reports, as dataclasses that become JSON once
block_records.py      what was done to the linears of a block
conversion_record.py  what a conversion reports
plan.py               what a run would take
serving_plan.py       how a model would be served; serving_console.py: its tables
console.py            every table the command prints
"""
