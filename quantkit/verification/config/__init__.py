"""What a quantization_config declares of each module.

compressed_tensors.py  config groups, targets, ignores
other_methods.py       awq, gptq, fp8, modelopt
"""
