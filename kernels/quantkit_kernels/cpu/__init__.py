"""Quantized linears and decode attention on a CPU. Needs torch alone; see `linear` and `attention`.

M tokens, N out features, K in features, G groups of a row.

linear.py     products, and which way each one goes
attention.py  decode attention
weight.py     how weights are packed
build.py      compiles the C++ once, and tries it
gemv.cpp gemv_int8.cpp gemm_tiles.cpp gemm_tiles_int8.cpp attention.cpp vectors.h weight.h tiles.h bf16.h   the C++
"""
