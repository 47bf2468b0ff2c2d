"""A number format for each linear by what it does to the model's output, for a given size. Start in run.py.

run.py          prepare, measure, choose, and run the recipe
units.py        the linears that move together, and what each candidate makes of them
harms.py        KL of the model's output with one unit alone quantized
context.py      how much of it a whole run leaves
choice.py       the least harm that fits, and sizes that cannot be
recipe_text.py  the choice as a recipe that a person reads
"""
