"""KL by the formats of cached keys and values: integers of a width, zero points, groups, channel constants.

    python eval/kv_cache.py --model M --calibration TEXT --eval TEXT [--formats keys=int8,values=int4 ...]

Prints a markdown table: bits an entry takes with its share of scales, for keys and for values, and the mean KL of the
model's next-token distributions from its own with an unquantized cache. First 8,192 tokens of the text in windows of
256; behind a format, `+channels` adds constants of channels from the first 8,192 tokens of the calibration text. Scales
count 16 bits, zero points 8 unless they are packed.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quantkit_eval.cached_model import CachedModel
from quantkit_eval.evaluation import score
from quantkit_eval.folders import load_model
from quantkit_eval.perplexity import cut
from quantkit_eval.texts import read_text

from quantkit.cache_spec import CacheSpec, cache_named
from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.grids.activations import KVRange
from quantkit.quantization.calibration.kv_channels import ChannelCache, choose_channels

LENGTH, TOKENS = 256, 8192
FORMATS = [
    *("int8", "keys=int8,values=int4", "keys=int4,values=int8", "int4"),
    *("int4-asym", "int4-asym-packed", "int4-g32", "int4-asym-g32-packed"),
    *("int4+channels", "int4-asym-packed+channels", "int4-asym-g32-packed+channels", "int4-asym-g16-packed+channels"),
    *("keys=int5,values=int4-asym-packed+channels", "keys=int5,values=int4", "fp8"),
]


def spec_of(text: str) -> CacheSpec:
    """The formats of one row; `+channels` at the end is for keys and values alike."""
    name, plus, _ = text.partition("+channels")
    found = cache_named(name)
    assert found is not None
    if not plus:
        return found
    keys, values = (None if side is None else replace(side, channels=True) for side in (found.keys, found.values))
    return CacheSpec(keys, values)


@torch.inference_mode()
def moments(model: Any, ids_ST: torch.Tensor) -> dict[int, Any]:
    """What `choose_channels` takes, by layer, from calibration windows."""
    seen: dict[int, Any] = {}
    looked_at = CachedModel(model, "model", None, make=lambda config: ChannelCache(seen, config))
    for ids_BT in ids_ST.split(8):
        looked_at(ids_BT)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibration", "--eval"):
        parser.add_argument(name, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    a = parser.parse_args()
    tokenizer = locate_tokenizer(Path(a.model), False)
    texts = [cut(read_text(path), tokenizer, LENGTH, TOKENS) for path in (a.calibration, a.eval)]
    model = load_model(Path(a.model), torch.device("cpu"))
    seen = moments(model, texts[0].ids_WT)
    text = model.config.get_text_config()
    features = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    print(f"| keys, values (heads of {features}) | bits of keys, of values | KL | top-1 agreement |\n|---|---|---|---|")
    for given in a.formats:
        spec = spec_of(given)
        ranges: dict[int, KVRange] = {layer: choose_channels(part, spec) for layer, part in seen.items()}
        found = score(CachedModel(model, a.model, spec, ranges), model, texts[1])
        assert found.kl is not None
        assert found.agree is not None
        bits = [16.0 if side is None else side.bits_per_entry(features) for side in (spec.keys, spec.values)]
        print(f"| {given} | {bits[0]:g}, {bits[1]:g} | {found.kl.mean():.6f} | {found.agree.mean():.2%} |", flush=True)


if __name__ == "__main__":
    main()
