"""The text that ships with quantkit: what calibrates a model when a recipe names no data.

- general.py reads the data set `general`, row by row.
- calibration.jsonl.xz and held-out.jsonl.xz are its two parts, other documents in each; SOURCES.md lists where every
  row comes from, LICENSES.txt has the licence texts. All four are written by the script make_general in examples.
"""

from quantkit.texts.general import PARTS as PARTS
from quantkit.texts.general import Part as Part
from quantkit.texts.general import general as general
from quantkit.texts.general import general_sha256 as general_sha256
