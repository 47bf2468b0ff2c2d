"""What a run, a plan and a verdict look like, and the report that people read.

records.py            what a run reports, as dataclasses that become JSON once
block_records.py      what was done to the linears of a block
allocation_record.py  what `quantkit auto` made
allocation_table.py   its table
conversion_record.py  what a conversion reports
plan.py               what a run would take
serving_plan.py       how a model would be served; serving_console.py: its tables
console.py            every table the command prints
text_results.py       what an evaluation found on a text
measurements.py       all that is measured of a folder after its run
verdict.py            recommended, with care or no, by which thresholds
document.py           run, measurements and verdict as one object, and its JSON schema
card.py               the report as the model card of the Hub
page.py               the report as one HTML page; report.css is its style
sections.py           its parts: verdict, size, divergence, perplexity by position
at_work.py            its parts: tasks, greedy samples
appendix.py           its parts: errors, outliers, folds, recipe, versions, hashes
figures.py            its figures, each a function of records
drawing.py            matplotlib's SVG in the colours of the page
markup.py             HTML in which text is escaped
"""
