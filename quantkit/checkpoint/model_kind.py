"""What kind of model a config.json describes, told without torch: only causal language models are quantized.

What is named here is refused at once; a type that is not named is judged by transformers when the model is built.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import read_json
from quantkit.errors import UserError

# model_type of config.json
ENCODER_DECODERS = {
    *("t5", "mt5", "umt5", "longt5", "switch_transformers", "t5gemma", "bart", "mbart", "plbart", "led", "pegasus"),
    *("pegasus_x", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "m2m_100", "nllb-moe", "mvp", "fsmt"),
    *("prophetnet", "xlm-prophetnet", "encoder-decoder", "whisper", "speech_to_text", "speecht5", "moonshine"),
    *("seamless_m4t", "seamless_m4t_v2", "pop2piano", "speech-encoder-decoder"),
}
ENCODERS = {
    *("albert", "convbert", "deberta", "deberta-v2", "distilbert", "esm", "eurobert", "flaubert", "fnet", "funnel"),
    *("gte", "ibert", "jina_embeddings_v3", "layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "longformer", "luke"),
    *("markuplm", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert", "nystromformer", "squeezebert", "tapas"),
    *("yoso", "canine", "splinter", "bros", "dpr"),
}
# Encoders that can be built as decoders: they are where config.json says is_decoder.
EITHER = {
    *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
VISION_LANGUAGE = {
    *("aria", "aya_vision", "blip", "blip-2", "chameleon", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid"),
    *("florence2", "glm4v", "glm4v_moe", "idefics", "idefics2", "idefics3", "instructblip", "internvl", "janus"),
    *("kosmos-2", "llava", "llava_next", "llava_next_video", "llava_onevision", "paligemma", "pix2struct", "qwen2_vl"),
    *("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llava", "vipllava", "vision-encoder-decoder"),
}
VISION_OR_SOUND = {
    *(
        "align",
        "altclip",
        "bark",
        "beit",
        "clip",
        "clap",
        "convnext",
        "convnextv2",
        "deit",
        "detr",
        "dinov2",
        "encodec",
    ),
    *("dinov3_vit", "efficientnet", "hubert", "mobilenet_v2", "mobilevit", "resnet", "rt_detr", "sam", "sam2"),
    *("segformer", "siglip", "siglip2", "swin", "swinv2", "videomae", "vit", "vit_mae", "vits", "wav2vec2", "wavlm"),
    *("wav2vec2-bert", "yolos"),
}
_TASKS = ("ForMaskedLM", "ForImageClassification", "ForObjectDetection", "ForCTC", "ForSpeechSeq2Seq")


def check_causal(folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """UserError where config.json describes no causal language model, or cannot be read; silent where it may be one."""
    config = read_json(folder / "config.json", "give a model folder") if config is None else config
    if (kind := other_model(config)) is None:
        return
    what = f"model_type {config['model_type']!r}" if "model_type" in config else "this model"
    if (folder / "modules.json").exists():
        kind += ", packed for sentence-transformers"
    raise UserError(
        f"{folder}: {next(iter(_architectures(config)), what)} is {kind}, not supported yet: "
        "only decoder-only language models (…ForCausalLM) are\nhint: give such a model: Llama, Qwen, Mistral, ..."
    )


def other_model(config: Mapping[str, Any]) -> str | None:
    """What a config.json describes where that is certainly no causal language model ("an encoder"); None elsewhere."""
    if isinstance(name := config.get("_class_name"), str):
        return f"a part of a diffusers pipeline ({name})"
    auto = config.get("auto_map")
    if isinstance(auto, Mapping) and "AutoModelForCausalLM" in auto:
        return None  # its own code decides
    kind, names = config.get("model_type"), _architectures(config)
    if not isinstance(kind, str):
        return None
    if config.get("is_encoder_decoder", kind in ENCODER_DECODERS) is True:
        return "an encoder-decoder model"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) and kind not in EITHER | ENCODERS:
        return None
    if kind in ENCODERS:
        return "an encoder"
    if kind in EITHER and not config.get("is_decoder"):
        return "an encoder (config.json does not say is_decoder: true)"
    if kind in VISION_LANGUAGE:
        return "a vision-language model"
    if kind in VISION_OR_SOUND:
        return "a model of images or sound"
    return "not a language model that writes text" if names and all(n.endswith(_TASKS) for n in names) else None


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
