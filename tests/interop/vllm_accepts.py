"""Run by the interpreter that has vLLM: which quantization configs do vLLM's own classes accept?

stdin: {name: quantization_config}; stdout: a line "ACCEPTS " + {name: "" or why it is refused}. Nothing is loaded: the
config is parsed, and every layer of a tiny Llama asks it for its method, as on one Hopper GPU.
"""

import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # otherwise the platform is unknown without a GPU

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

BLOCK = {
    "self_attn.qkv_proj": QKVParallelLinear,
    "self_attn.o_proj": RowParallelLinear,
    "mlp.gate_up_proj": MergedColumnParallelLinear,
    "mlp.down_proj": RowParallelLinear,
}
LAYERS = {f"model.layers.{layer}.{name}": kind for layer in range(2) for name, kind in BLOCK.items()}
LAYERS["lm_head"] = ParallelLMHead
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")


def check(config: dict) -> None:
    """Raises whatever vLLM raises."""
    method = config.get("quant_method", "").lower()
    if method == "modelopt":
        names = (get_quantization_config(name).override_quantization_method(config, None) for name in MODELOPT)
        method = next((name for name in names if name), method)
    quantization = get_quantization_config(method).from_config(config)
    quantization.packed_modules_mapping = MAPPING
    for name, kind in LAYERS.items():
        layer = kind.__new__(kind)
        torch.nn.Module.__init__(layer)
        for size in ("input_size", "output_size", "input_size_per_partition", "output_size_per_partition"):
            setattr(layer, size, 512)
        quantization.get_quant_method(layer, name)
    if method == "compressed-tensors":
        compressed_tensors.CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(quantization.kv_cache_scheme)


def pretend() -> None:
    """A Hopper GPU, and kernels that are always found: the question is what vLLM has, not what this machine runs."""
    platform = type(current_platform)
    platform.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    platform.is_cpu, platform.is_cuda = (lambda self: False), (lambda self: True)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.model_executor.layers.quantization"):
            for attribute in [a for a in vars(module) if a.startswith("init_") and a.endswith("_kernel")]:
                setattr(module, attribute, MagicMock())
            if hasattr(module, "cutlass_fp8_supported"):
                vars(module)["cutlass_fp8_supported"] = lambda: True


def main() -> None:
    for method in ("fp8", *MODELOPT):
        get_quantization_config(method)
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    pretend()
    answers = {}
    with set_current_vllm_config(config):
        for name, config in json.load(sys.stdin).items():
            try:
                check(config)
                answers[name] = ""
            except Exception as error:
                answers[name] = f"{type(error).__name__}: {error}"
    print("ACCEPTS " + json.dumps(answers))


if __name__ == "__main__":
    main()
