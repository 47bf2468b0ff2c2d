"""The widest linear of a model's blocks, known before anything is traced."""

from torch import nn

from quantkit.model.meta_model import find_blocks
from quantkit.recipe.recipe import Recipe


def widest_input(model: nn.Module, recipe: Recipe) -> int:
    """The most input features of a linear of the blocks that the recipe quantizes; 0 where there is none.

    Experts' weights [experts, N, K] lie either way round in different models: the smaller of N and K counts.
    """
    prefix, blocks = find_blocks(model)
    widest = 0
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            kind = type(module).__name__
            for param in module.parameters(recurse=False):
                if param.ndim < 2 or isinstance(module, nn.Embedding):
                    continue
                if recipe.weights_for(f"{prefix}.{index}.{name}", kind) is None:
                    continue
                features = param.shape[-1] if isinstance(module, nn.Linear) else min(param.shape[-2:])
                widest = max(widest, param.shape[0] if kind == "Conv1D" else features)
    return widest
