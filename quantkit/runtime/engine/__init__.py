"""The paged runtime. Start in llm.py.

llm.py           LLM: prompts in, tokens out
engine.py        its step: schedule, compute, choose, hand out
request.py       what a user asks for and gets; a request on its way
model_source.py  which models it runs, and how large a cache
scheduler.py     which tokens the next step computes
blocks.py        who holds which block of the cache, and which can be shared
cache.py         keys and values in blocks, plain or as codes
attention.py     attention over them, inside transformers' models
gpu.py           the same by Triton's kernels
runner.py        one step of a model
sampling.py      the next token from logits
speculation.py   guesses at tokens, by prompt lookup or by a draft model
text.py          text of tokens, and where a sequence ends
"""
