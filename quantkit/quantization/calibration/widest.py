"""The widest linear of a model's blocks, known before anything is traced."""

from torch import nn
from transformers import PreTrainedModel

from quantkit.model.meta_model import find_blocks
from quantkit.recipe.recipe import Recipe


def widest_input(model: PreTrainedModel, recipe: Recipe) -> int:
    """The most input features of a linear of the blocks that the recipe quantizes; 0 where there is none."""
    path, blocks = find_blocks(model)
    hidden = model.config.get_text_config().hidden_size
    widest = 0
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Embedding):
                continue
            kind = type(module).__name__
            for leaf, param in module.named_parameters(recurse=False):
                if param.ndim in (2, 3) and recipe.weights_for(f"{path}.{index}.{name}", kind) is not None:
                    widest = max(widest, _features(leaf, kind, (param.shape[-2], param.shape[-1]), hidden))
    return widest


def _features(leaf: str, kind: str, shape: tuple[int, int], hidden: int) -> int:
    """K of a weight [N, K]; GPT-2's are [K, N], and those of experts lie either way round."""
    if kind == "Conv1D":
        return shape[0]
    if leaf == "weight":
        return shape[1]
    writes = "down" in leaf or leaf in ("w2", "wo")  # back into the hidden states
    swapped = shape[1 if writes else 0] == hidden != shape[0 if writes else 1]
    return shape[0 if swapped else 1]
