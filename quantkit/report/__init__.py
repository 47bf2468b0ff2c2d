"""What a run, a plan and a verdict look like.

records.py            what a run reports, as dataclasses that become JSON once
block_records.py      what was done to the linears of a block
allocation_record.py  what `quantkit auto` made
allocation_table.py   its table
conversion_record.py  what a conversion reports
plan.py               what a run would take
console.py            every table the command prints
"""
