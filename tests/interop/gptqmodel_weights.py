"""Run by test_gptqmodel.py in an environment that has gptqmodel: the weights it makes of packed tensors.

    python gptqmodel_weights.py CASES OUT   both torch files, name -> case and name -> {"weight", "product"}

A case holds the format's name, bits, group_size, sym, shape [N, K] and tensors by suffix.
"""

import sys
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module


def run(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """weight [N, K] as its module decodes it, product [K, N]: what the module makes of the unit matrix."""
    (N, K), kind = case["shape"], AwqTorchLinear if case["format"] == "awq" else TorchLinear
    module = kind(
        bits=case["bits"],
        group_size=case["group_size"],
        sym=case["sym"],
        desc_act=False,
        in_features=K,
        out_features=N,
        register_buffers=True,
    )
    for suffix, tensor in case["tensors"].items():
        assert getattr(module, suffix).shape == tensor.shape, suffix
        assert getattr(module, suffix).dtype == tensor.dtype, suffix
        setattr(module, suffix, tensor)
    if case["format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits=case["bits"], pack_dtype=torch.int32)
    module.optimize = lambda *args, **kwargs: None  # it would compile with a C++ compiler
    module.eval()
    module.post_init()
    if case["format"] == "awq":
        packed = (module.qweight, module.qzeros, module.scales)
        weight_KN = dequantize_gemm(*packed, bits=4, group_size=module.group_size)
    else:
        weight_KN = module.dequantize_weight()
    with torch.no_grad():
        product_KN = module(torch.eye(K, dtype=torch.float16))
    return {"weight": weight_KN.T.contiguous(), "product": product_KN}


def main() -> None:
    cases = torch.load(sys.argv[1])
    torch.save({name: run(case) for name, case in cases.items()}, sys.argv[2])


if __name__ == "__main__":
    main()
