"""Texts that ship with quantkit: the default calibration data `general` and a held-out part of the same mix.

general.py             reads the rows, lazily
calibration.jsonl.xz   the rows to calibrate on
held-out.jsonl.xz      rows of other documents, for evaluation
SOURCES.md             where the rows come from: package, version, licence, what was taken
LICENSES.txt           the licences and notices of those packages

`examples/make_general.py` writes all but the first.
"""

from quantkit.texts.general import PARTS as PARTS
from quantkit.texts.general import Part as Part
from quantkit.texts.general import general as general
from quantkit.texts.general import general_sha256 as general_sha256
