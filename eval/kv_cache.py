"""KL by the formats of cached keys and values: integers of a width, zero points, groups, channel constants.

    python eval/kv_cache.py --model M --calibration TEXT --eval TEXT [--formats NAME ...]     # one after the other
    python eval/kv_cache.py --model M --calibration TEXT --eval TEXT --grid [NAME ...]        # of keys by of values

Prints a markdown table: the mean KL of the model's next-token distributions, with such a cache, from its own without.
First 8,192 tokens of the text in windows of --context; `+channels` behind a name adds constants of channels from the
first 8,192 tokens of the calibration text, in windows of --calibration-context (as long, if not given). Bits of an
entry count its share of scales, 16 bits each, and of zero points, 8 each unless they are packed.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quantkit_eval.cached_model import CachedModel
from quantkit_eval.evaluation import Scores, score
from quantkit_eval.folders import load_model
from quantkit_eval.perplexity import Windows, cut
from quantkit_eval.texts import read_text

from quantkit.cache_spec import CacheSpec, cache_named
from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.quantization.calibration.kv_channels import ChannelCache, Moments, choose_channels
from quantkit.types import KVSpec

TOKENS = 8192
CHANNELS = "+channels"
FORMATS = [
    *("int8", "fp8", "int4", "int4-g32", "int4-asym", "int4-asym-packed", "int4-asym-g32-packed"),
    *("int4+channels", "int4-asym-packed+channels", "int4-asym-g32-packed+channels", "int4-asym-g16-packed+channels"),
    *("int6", "int5", "int5+channels", "int3-asym-g16-packed+channels"),
]
GRID = ["none", "fp8", "int8", "int4", "int4-asym-g32-packed+channels"]


class Measurement:
    """A model, what its cache holds on the calibration text, and the windows it is compared with itself on."""

    def __init__(self, folder: str, calibration: str, text: str, context: int, calibration_context: int) -> None:
        tokenizer = locate_tokenizer(Path(folder), False)
        calibration_windows = cut(read_text(calibration), tokenizer, calibration_context, TOKENS)
        self.windows = cut(read_text(text), tokenizer, context, TOKENS)
        self.name, self.model = folder, load_model(Path(folder), torch.device("cpu"))
        self.seen = self._moments(calibration_windows)
        config: Any = self.model.config.get_text_config()
        self.features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @torch.inference_mode()
    def _moments(self, windows: Windows) -> dict[int, tuple[Moments, Moments]]:
        seen: dict[int, tuple[Moments, Moments]] = {}
        observed = CachedModel(self.model, self.name, None, make=lambda config: ChannelCache(seen, config))
        for ids_BT in windows.ids_WT.split(8):
            observed(ids_BT)
        return seen

    def scores(self, spec: CacheSpec) -> Scores:
        """The model with such a cache against itself."""
        ranges = {layer: choose_channels(moments, spec) for layer, moments in self.seen.items()}
        return score(CachedModel(self.model, self.name, spec, ranges), self.model, self.windows)

    def bits(self, side: KVSpec | None) -> str:
        """Of an entry; nothing for what is not quantized."""
        return "" if side is None else f"{side.bits_per_entry(self.features):g}"


def side_of(name: str) -> KVSpec | None:
    """The format of a name, with constants of channels where it ends in +channels."""
    found = cache_named(name.removesuffix(CHANNELS))
    side = None if found is None else found.keys
    return replace(side, channels=True) if side is not None and name.endswith(CHANNELS) else side


def by_format(measured: Measurement, names: list[str]) -> None:
    """A row for each format, of keys and values alike."""
    print("| keys and values | bits of an entry | KL | top-1 agreement |\n|---|---|---|---|")
    for name in names:
        side = side_of(name)
        found = measured.scores(CacheSpec(side, side))
        assert found.kl is not None
        assert found.agree is not None
        cells = [name, measured.bits(side), f"{found.kl.mean():.6f}", f"{found.agree.mean():.2%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def by_side(measured: Measurement, names: list[str]) -> None:
    """A row for each format of keys, a column for each of values; nothing where neither is quantized."""
    sides = {name: side_of(name) for name in names}
    heads = [f"{name} ({bits})" if (bits := measured.bits(side)) else name for name, side in sides.items()]
    print(f"| keys, values (bits) | {' | '.join(heads)} |\n{'|---' * (1 + len(heads))}|")
    for head, keys in zip(heads, sides.values(), strict=True):
        cells = []
        for values in sides.values():
            kl = None if keys is values is None else measured.scores(CacheSpec(keys, values)).kl
            cells.append("" if kl is None else f"{kl.mean():.6f}")
        print(f"| {head} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibration", "--eval"):
        parser.add_argument(name, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--grid", nargs="*")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--calibration-context", type=int)
    a = parser.parse_args()
    measured = Measurement(a.model, a.calibration, a.eval, a.context, a.calibration_context or a.context)
    if a.grid is None:
        by_format(measured, a.formats)
    else:
        by_side(measured, a.grid or GRID)


if __name__ == "__main__":
    main()
