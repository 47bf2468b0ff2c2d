"""Triton kernels for quantized linears and paged attention. Needs torch and triton, nothing of quantkit.

Shapes: M tokens, N out features, K in features, G groups of a row. Each module is one kernel: contract, reference
(the definition), kernel, wrapper. Importing a module registers its operators under torch.ops.quantkit_kernels.
"""

__version__ = "0.1.0"
