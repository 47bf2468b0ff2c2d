"""From a config to a model without weights, and its decoder blocks."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from quantkit.errors import UserError

if TYPE_CHECKING:
    pass


def read_config(folder: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; UserError for an unknown architecture or one that needs remote code unasked."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UserError(
                f"{folder}: this model needs its own Python code; pass --trust-remote-code if you trust it"
            ) from error
        raise UserError(
            f"{folder}: transformers cannot read this model's config.json: {text.splitlines()[0]}"
        ) from error


def build_meta_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer (rotary tables) real.

    Experts run as the plain loop over experts, so that each expert's matrix product can be observed.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, experts_implementation="eager"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise UserError("this model needs its own Python code; pass --trust-remote-code if you trust it") from error
        raise UserError(
            f"transformers cannot build a causal language model from this config.json "
            f"(model_type {getattr(config, 'model_type', None)!r}): {error}"
        ) from error
    finally:
        nn.Module.register_parameter = register
    model.tie_weights()
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Path and members of the decoder blocks: the heaviest ModuleList that lies in no other one."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outer:
        raise UserError("this model has no list of decoder blocks: nothing to quantize block by block")
    path = max(outer, key=lambda name: sum(p.numel() for p in outer[name].parameters()))
    return path, list(outer[path])
