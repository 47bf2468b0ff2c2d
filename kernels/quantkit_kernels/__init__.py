"""Triton kernels for quantized linears and paged attention. Needs torch and triton, nothing of quantkit.

Shapes: M tokens, N out features, K in features, G groups of a row. Each module is one kernel: contract, reference
(the definition), kernel, wrapper. Importing a module registers its operators under torch.ops.quantkit_kernels.

w4a16.py w8a16.py fp4.py  weight-only products by format; weight_only.py is their kernel, decode.py the weight
w8a8.py                   products of 8-bit inputs; quantize_activations.py makes them
paged_attention.py        decode attention on a paged cache; kv_write.py fills it
layout.py                 how weights are packed for these kernels
configs.py tune.py        tile sizes: tables, and the search that fills them; timing.py times a candidate
checks.py common.py       arguments checked; pieces the kernels share
cpu/                      the same products on a CPU
"""

__version__ = "0.1.0"
