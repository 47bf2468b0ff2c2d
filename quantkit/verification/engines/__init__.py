"""What each engine accepts, by its own rules.

shared_rules.py  what all of them share
hardware.py      which number format runs on which hardware
vllm.py vllm_schemes.py vllm_kernels.py sglang.py transformers.py tensorrt_llm.py llama_cpp.py
"""
