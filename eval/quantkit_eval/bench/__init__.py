"""Speed of a model in the paged engine, beside transformers, another model and llama.cpp. Start in benchmark.py.

benchmark.py   the run: engine and baselines in turn
options.py     what is measured; refusals before torch is imported
workload.py    requests: lengths, arrivals, prompts
engine_run.py  requests through the engine, in virtual time
baselines.py   the same requests through transformers
llama_bench.py the same lengths in llama.cpp's own benchmark
machine.py     peak of products and bandwidth, measured; what a model computes and reads
regime.py      what limits prefill and decode, by evidence
statistics.py  latencies and their percentiles
results.py     what was found, as dataclasses that become JSON once
tables.py      as tables
plot.py        as an SVG picture
profiling.py   a trace, and seconds by kind of work
"""
