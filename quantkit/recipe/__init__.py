"""The recipe: everything a run depends on, as plain data. No torch here: checking one is instant. Start in recipe.py.

recipe.py          class Recipe
load.py            recipes from YAML files, shipped names and plain data
names.py           which shipped recipe a name, a scheme or another tool's word means
gguf_names.py      what a name of llama.cpp's types means
number_formats.py  weights, activations, cache, and the presets that stand for them
candidates.py      number formats that `quantkit auto` chooses from
algorithms.py      options of algorithms and transforms
sections.py        calibration, overrides, output
gguf.py            the section that makes a GGUF file
data_sets.py       data sets with a short name, and where they lie on the Hub
keys.py            every key by its dotted name, and the type of its values
yaml_document.py   YAML with line numbers
messages.py        validation errors in the words of the recipe's author
"""
