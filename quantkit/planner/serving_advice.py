"""Which scheme to serve in, by six rules: from figures alone, so that each rule can be tried by itself.

1. weights     they do not fit: INT8 weights where these fit, else INT4
2. capacity    too few sequences fit: an fp8 or int8 cache
3. interconnect  links take most of a step: fewer devices a layer, or a pipeline
4. decode      interactive, and bound by memory bandwidth: W4A16
5. prefill     batch, and bound by products: FP8 where the device multiplies it, else W8A8
6. quality     without a profile: FP8_DYNAMIC or W8A8; the rest is added one by one
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.report.serving_plan import AdviceRow, PhaseTime, SchemeServing

INTEGERS = ("W8A16", "W4A16")  # the milder first
CAREFUL = {"FP8_DYNAMIC": "fp8", "FP8": "fp8", "W8A8": "int8"}  # with what their products are made of
GAIN = 1.1  # a scheme with a larger error has to be faster by this
LINKS = ("interconnect bandwidth", "interconnect latency")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of devices.

    usable  bytes of a device for weights and caches; peaks: formats that it multiplies
    cache   the 8-bit one that the engine reads
    """

    profile: str | None
    concurrency: int
    context: int
    tp: int
    pp: int
    usable: float
    peaks: tuple[str, ...]
    cache: str


@dataclass(frozen=True, slots=True)
class Advice:
    """scheme: None where nothing fits; why: in a sentence; rows: all rules that apply, the one of the scheme first."""

    scheme: str | None
    cache: str
    why: str
    rows: tuple[AdviceRow, ...]


def advise(schemes: Mapping[str, SchemeServing], asked: Asked) -> Advice:
    """The scheme and the cache to take. schemes: by name, bf16 among them; those the engine refuses are never taken."""
    able = {name: each for name, each in schemes.items() if each.able}
    if not able:
        return Advice(None, "bf16", "the engine does not run this model there", ())
    first = _weights(schemes["bf16"], able, asked)
    chosen = first or _by_profile(schemes["bf16"], able, asked)
    rows = [chosen]
    scheme = None if chosen.change == NOTHING else chosen.change
    cache = "bf16"
    if scheme is not None and able[scheme].max_concurrency["bf16"] < asked.concurrency:
        cache, row = _capacity(able[scheme], asked)
        rows.append(row)
    if schemes["bf16"].decode.regime in LINKS or schemes["bf16"].prefill.regime in LINKS:
        rows.append(_links(schemes["bf16"], schemes[scheme or "bf16"], asked))
    if chosen.rule == "quality":
        rows += _one_by_one(able, asked, scheme, cache)
    return Advice(scheme, cache, chosen.why, tuple(rows))


NOTHING = "more memory"


def _weights(base: SchemeServing, able: Mapping[str, SchemeServing], asked: Asked) -> AdviceRow | None:
    """The rule for weights that do not fit: None where they do."""
    if base.weights_fit:
        return None
    size = f"bf16 weights take {base.weight_bytes_per_device / 1e9:.1f} GB of each device and do not fit"
    fitting = [able[name] for name in INTEGERS if name in able and able[name].weights_fit]
    serving = [each for each in fitting if max(each.max_concurrency.values()) >= asked.concurrency]
    holding = [each for each in fitting if max(each.max_concurrency.values()) >= 1]
    if not (found := serving or holding):
        smallest = min((each.weight_bytes_per_device for each in able.values()), default=base.weight_bytes_per_device)
        why = (
            f"{size}; the smallest scheme that the engine runs there takes {smallest / 1e9:.1f} GB: raise --tp or --pp"
        )
        return AdviceRow("weights", NOTHING, why)
    return AdviceRow("weights", found[0].scheme, f"{size}; in {found[0].scheme} they take "
                     f"{found[0].weight_bytes_per_device / 1e9:.1f} GB")  # fmt: skip


def _by_profile(base: SchemeServing, able: Mapping[str, SchemeServing], asked: Asked) -> AdviceRow:
    careful = careful_scheme(able, asked.peaks)
    small = able.get("W4A16")
    if asked.profile == "interactive" and small is not None:
        slow, fast = able[careful].request_seconds, small.request_seconds
        if slow > GAIN * fast:  # fewer bytes alone make it faster: its products are those of bf16
            why = (
                f"a token reads all weights: decode is bound by memory bandwidth; a request takes {fast:.2f} s in "
                f"W4A16, {slow:.2f} s in {careful}, {base.request_seconds:.2f} s in bf16"
            )
            return AdviceRow("decode", "W4A16", why)
    if asked.profile == "batch":
        mild, fast = able[careful], small or able[careful]
        if fast.tokens_per_second > GAIN * mild.tokens_per_second:
            why = f"W4A16 makes {fast.tokens_per_second:.0f} tokens/s, {careful} {mild.tokens_per_second:.0f}"
            return AdviceRow("decode", "W4A16", f"decode takes most of the time and reads all weights: {why}")
        if base.prefill.regime == "compute":
            why = (
                f"prompts are bound by products, which {careful} makes in 8 bits: "
                f"{mild.tokens_per_second:.0f} tokens/s, {base.tokens_per_second:.0f} in bf16"
            )
            return AdviceRow("prefill", careful, why)
    why = "the engine runs no 8-bit scheme there that the device multiplies"
    if careful in CAREFUL:
        why = f"quality comes first: {careful} halves the weights, and the device multiplies {CAREFUL[careful]}"
    if asked.profile is not None:
        why += f"; no smaller scheme is {GAIN - 1:.0%} faster: decode is bound by {base.decode.regime}"
    return AdviceRow("quality", careful, why)


def careful_scheme(able: Mapping[str, SchemeServing], peaks: tuple[str, ...]) -> str:
    """FP8_DYNAMIC where the device multiplies fp8, else W8A8 where it multiplies int8; bf16 where neither runs."""
    for name, kind in CAREFUL.items():
        if name in able and kind in peaks:
            return name
    return "bf16" if "bf16" in able else next(iter(able))


def _capacity(chosen: SchemeServing, asked: Asked) -> tuple[str, AdviceRow]:
    """The cache to take and the rule for too few sequences."""
    few, more = chosen.max_concurrency["bf16"], chosen.max_concurrency[asked.cache]
    why = f"{few} sequences of {asked.context} tokens fit beside the weights, {asked.concurrency} are asked"
    if more > few:
        enough = "" if more >= asked.concurrency else f": lower --concurrency to {more}, or raise --tp"
        own = " of quantkit's paged engine" if asked.cache == "int8" else ""
        return asked.cache, AdviceRow(
            "capacity", f"{asked.cache} cache", f"{why}; {more} with the {asked.cache} cache{own}{enough}"
        )
    return "bf16", AdviceRow("capacity", "fewer sequences", f"{why}: lower --concurrency to {few}, or raise --tp")


def _links(base: SchemeServing, chosen: SchemeServing, asked: Asked) -> AdviceRow:
    shares = [
        f"{(phase.interconnect_bandwidth + phase.interconnect_latency) / _device(phase):.0%} of {name}"
        for name, phase in (("prefill", base.prefill), ("decode", base.decode))
        if phase.regime in LINKS
    ]
    half = asked.tp // 2 if asked.tp % 2 == 0 else 1
    change = f"--tp {half} --pp {asked.pp * asked.tp // half}"
    if chosen.weight_bytes / (half * asked.pp) < asked.usable:
        change = f"--tp {half}, or {change}"
    return AdviceRow("interconnect", change, f"links take {' and '.join(shares)} with --tp {asked.tp}")


def _device(phase: PhaseTime) -> float:
    return max(phase.compute, phase.memory) + phase.interconnect_bandwidth + phase.interconnect_latency


def _one_by_one(able: Mapping[str, SchemeServing], asked: Asked, scheme: str | None, cache: str) -> list[AdviceRow]:
    """What may follow the careful scheme, each step measured before the next."""
    rows = []
    if cache == "bf16" and scheme is not None:
        more = able[scheme].max_concurrency[asked.cache]
        why = f"then measure again: {more} sequences fit in place of {able[scheme].max_concurrency['bf16']}"
        rows.append(AdviceRow("next", f"{asked.cache} cache", why))
    if "W4A16" in able and scheme is not None and able[scheme].token_seconds > GAIN * able["W4A16"].token_seconds:
        why = (
            f"after that, if speed is short: {able['W4A16'].token_seconds * 1e3:.1f} ms a token in place of "
            f"{able[scheme].token_seconds * 1e3:.1f} ms"
        )
        rows.append(AdviceRow("next", "W4A16", why))
    return rows
