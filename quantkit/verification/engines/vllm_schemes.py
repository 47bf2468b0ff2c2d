"""vLLM 0.33's choice among its compressed-tensors schemes (its _get_scheme_from_parts)."""

from quantkit.verification.subject import DeclaredNumbers, DeclaredScheme

ACTIVATION_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")


def scheme(said: DeclaredScheme) -> str | None:
    """vLLM's own choice among its compressed-tensors schemes, in its order, as if on Hopper; None: it has none."""
    weights, inputs, layout = said.weights, said.inputs, said.layout
    if _nvfp4(weights):
        if inputs is None:
            return "NVFP4A16"
        return "NVFP4" if _nvfp4(inputs) else None
    if weights.kind == "float" and weights.strategy == "group" and weights.group_size == 32 and weights.symmetric:
        if weights.bits == 4:
            token = inputs and inputs.kind == "float" and inputs.bits == 8 and inputs.dynamic and inputs.symmetric
            return "MXFP4A8" if token and inputs and inputs.strategy in ("token", "group") else "MXFP4"
        if weights.bits == 8 and weights.scale_dtype == "uint8":
            return "MXFP8"
    static = not weights.dynamic
    ranged = weights.strategy in ("channel", "group")
    if inputs and _w4a8_fp8(weights, inputs):
        return "W4A8-FP8"
    if _fake_quantized(said) and ranged and static:
        return "WNA8O8"
    if (
        layout == "pack-quantized"
        and inputs
        and _token_integers(inputs)
        and weights.kind == "int"
        and static
        and ranged
    ):
        return f"WNA{inputs.bits}"
    if inputs is None and ranged and static and layout == "pack-quantized":
        return "WNA16"
    if layout not in ACTIVATION_FORMATS:
        return None
    if _fp8_weights(weights):
        scaled = inputs and inputs.kind == "float"
        if scaled and inputs and (inputs.dynamic or (inputs.symmetric and inputs.strategy == "tensor")):
            return "FP8"
        return "FP8A16"
    if inputs is None or not weights.symmetric or weights.dynamic:
        return None
    token = inputs.strategy == "token" and bool(inputs.dynamic)
    fixed = inputs.strategy == "tensor" and not inputs.dynamic
    if weights.bits == inputs.bits == 8 and weights.strategy in ("tensor", "channel") and (token or fixed):
        return "INT8"
    if (weights.kind, inputs.kind, weights.bits, inputs.bits) == ("int", "int", 4, 8) and ranged:
        return "W4A8-INT" if token else None
    return None


def _w4a8_fp8(weights: DeclaredNumbers, inputs: DeclaredNumbers) -> bool:
    return (
        (weights.kind, weights.bits, weights.strategy, weights.symmetric) == ("int", 4, "group", True)
        and (inputs.kind, inputs.bits, inputs.strategy, inputs.symmetric) == ("float", 8, "token", True)
        and bool(inputs.dynamic)
        and not weights.dynamic
    )


def _token_integers(n: DeclaredNumbers) -> bool:
    return n.kind == "int" and n.symmetric and bool(n.dynamic) and n.strategy in ("token", "group") and n.bits in (4, 8)


def _nvfp4(n: DeclaredNumbers) -> bool:
    return (n.strategy, n.kind, n.bits, n.group_size, n.symmetric) == ("tensor_group", "float", 4, 16, True)


def _fp8_weights(n: DeclaredNumbers) -> bool:
    return n.kind == "float" and n.symmetric and not n.dynamic and n.strategy in ("tensor", "channel", "block")


def _fake_quantized(said: DeclaredScheme) -> bool:
    """Integer weights whose inputs and outputs both have static 8-bit integer scales."""
    if said.weights.kind != "int" or said.layout not in ("pack-quantized", "int-quantized"):
        return False
    return all(
        n is not None and n.kind == "int" and n.strategy == "tensor" and n.bits == 8 and not n.dynamic
        for n in (said.inputs, said.outputs)
    )
