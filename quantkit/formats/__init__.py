"""How codes and scales lie in a file: one module per format, pure functions, no files opened here."""

from quantkit.formats import compressed_tensors

FORMATS = {"compressed-tensors": compressed_tensors}
