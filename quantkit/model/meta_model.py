"""From a config to a model without weights, and its decoder blocks."""

from pathlib import Path

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from quantkit.errors import UserError
from quantkit.library_output import quiet_libraries


def read_config(folder: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; UserError for an unknown architecture or one that needs remote code unasked."""
    try:
        with quiet_libraries():
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
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(refusal(config, "an encoder-decoder model"))
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta
    try:
        with no_init_weights(), quiet_libraries():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, experts_implementation="eager"
            )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError("this model needs its own Python code; pass --trust-remote-code if you trust it") from error
        if "Unrecognized configuration class" in str(error):
            raise UserError(refusal(config, kind_of(config))) from error
        raise UserError(
            f"transformers cannot build a causal language model from this config.json "
            f"(model_type {getattr(config, 'model_type', None)!r}): {type(error).__name__}: {error}"
        ) from error
    finally:
        nn.Module.register_parameter = register
    if is_encoder(model):
        raise UserError(refusal(config, "an encoder (config.json does not say is_decoder: true)"))
    model.tie_weights()
    return model.eval()


def refusal(config: PretrainedConfig, kind: str) -> str:
    """The message for a model that is not a decoder-only language model: what it is and what is supported."""
    name = (getattr(config, "architectures", None) or [f"model_type {getattr(config, 'model_type', None)!r}"])[0]
    return f"{name} is {kind}, not supported yet: only decoder-only language models (…ForCausalLM) are"


def kind_of(config: PretrainedConfig) -> str:
    """What a model is that transformers cannot build as a causal language model: by its config and its registries."""
    name = (getattr(config, "architectures", None) or [""])[0]
    kinds = {
        "a vision-language model": ("IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING"),
        "an encoder": ("MASKED_LM", "TEXT_ENCODING"),
        "an encoder-decoder model": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    }
    if hasattr(config, "vision_config"):
        return "a vision-language model"
    for kind, tasks in kinds.items():
        for task in tasks:
            known = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
            if config.model_type in known:
                return kind
    return "a model of another kind" if name else "a model of an unknown kind"


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether every token of this model sees the tokens behind it: a BERT built with a language-model head.

    Configs of such models have `is_decoder`; False means attention in both directions (in GPT-NeoX it means nothing).
    """
    config = model.config.get_text_config()
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if getattr(config, "is_decoder", getattr(config, "causal", not masked)):
        return False
    return masked or any(getattr(module, "is_causal", True) is False for module in model.modules())


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Path and members of the decoder blocks: the heaviest ModuleList that lies in no other one.

    Lists as long as the config says the text model is deep go before others, such as those of an audio encoder.

    UserError where there is none, or where two blocks share a parameter.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outer:
        raise UserError("this model has no list of decoder blocks: nothing to quantize block by block")
    depth = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    deep = [name for name, module in outer.items() if len(module) == getattr(depth, "num_hidden_layers", None)]
    path = max(deep or outer, key=lambda name: sum(p.numel() for p in outer[name].parameters()))
    blocks = list(outer[path])
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, param in block.named_parameters():
            first = owners.setdefault(id(param), index)
            if first != index:
                raise UserError(
                    f"{path}.{index}.{name}: this parameter also belongs to {path}.{first}; models whose blocks share "
                    f"parameters ({type(model).__name__}) are not supported yet"
                )
    return path, blocks
