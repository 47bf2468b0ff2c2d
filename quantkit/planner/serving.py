"""`quantkit plan --gpu`: how a model will be served on a device in bf16 and in each scheme, and which one to take."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.checkpoint.header import read_json
from quantkit.errors import UserError
from quantkit.planner import roofline
from quantkit.planner.candidate_schemes import UNQUANTIZED, Candidate, candidates, one_expert, shipped
from quantkit.planner.devices import Device, device_named
from quantkit.planner.model_inventory import take_inventory
from quantkit.planner.roofline import Step, step
from quantkit.planner.served_model import CACHES, SERVED, ServedModel, StoredWeights, served_model
from quantkit.planner.serving_advice import Advice, Asked, advise
from quantkit.planner.traffic import Traffic, check_traffic
from quantkit.recipe.recipe import Recipe
from quantkit.report.serving_plan import (
    AllReduce,
    CacheSize,
    DeviceFigures,
    PhaseTime,
    SchemeServing,
    ServingPlan,
)

USABLE = 0.9  # of a device's memory, for weights and caches: vLLM's --gpu-memory-utilization
CONTEXT, PROMPT, OUTPUT = 8192, 1024, 256
SHOWN_CONTEXT = 4096  # a length at which caches are easily compared
OWN_CACHE = "int8"  # of quantkit's paged engine: on a CPU, and where the engine reads no fp8
ASSUMPTIONS = (
    "bounds, not measurements: kernels reach their device's peak, and memory is read once; real engines take longer",
    f"{USABLE:.0%} of a device's memory is for weights and caches",
    f"8-bit and 4-bit products reach {roofline.LOW_PRECISION:.0%} of their peak, as inputs are rounded on the way",
    f"the host needs {roofline.HOST_STEP * 1e3:g} ms a step, beside the device",
    "an all-reduce of next to nothing takes the latency given for the link, twice a layer",
)


@dataclass(frozen=True, slots=True)
class Load:
    """`Traffic` with its defaults filled in."""

    context: int
    concurrency: int
    prompt: int
    output: int
    tp: int
    pp: int
    price: float | None

    @property
    def devices(self) -> int:
        return self.tp * self.pp


def plan_serving(
    folder: Path,
    gpu: str,
    traffic: Traffic,
    *,
    recipe: Recipe | None = None,
    engine: str = "vllm",
    name: str | None = None,
    trust_remote_code: bool = False,
) -> ServingPlan:
    """How the model of a folder with config.json is served on devices of a kind; nothing is read but JSON and headers.

    gpu     a name of `devices.NAMES`; recipe: a row of its own beside bf16 and the shipped schemes
    engine  whose rules decide which schemes are possible; name: what the plan calls the model
    UserError for an unknown device or engine, for a tp that does not divide the model's heads, and for more tokens
    than the model takes.
    """
    device = device_named(gpu)
    inventory = take_inventory(folder, trust_remote_code=trust_remote_code)
    config = read_json(folder / "config.json", "")
    model = served_model(inventory)
    load = fitted(traffic, model, name or str(folder))
    found = candidates(inventory, config, engine, device, load.tp, recipe)
    schemes = {each.name: served(each, model, device, load) for each in found if each.stored is not None}
    asked = Asked(
        traffic.profile,
        load.concurrency,
        load.context,
        load.tp,
        load.pp,
        USABLE * device.memory,
        tuple(device.peaks),
        OWN_CACHE if device.name == "cpu" else "fp8",
    )

    def readable(each: Candidate) -> bool:
        if each.recipe is None:  # a cache is asked of a scheme: of any that the engine runs
            each = next((other for other in found if other.recipe and other.refused is None), each)
        if each.recipe is None:
            return True
        few = one_expert(inventory)
        return shipped(each.name, each.recipe, few, config, engine, device, load.tp, asked.cache).refused is None

    advice, chosen = _taken(found, schemes, asked, readable)
    base = schemes[UNQUANTIZED]
    return ServingPlan(
        model=name or str(folder),
        model_type=config.get("model_type"),
        device=_figures(device),
        engine=engine,
        tp=load.tp,
        pp=load.pp,
        profile=traffic.profile,
        context=load.context,
        concurrency=load.concurrency,
        prompt=load.prompt,
        output=load.output,
        price=load.price,
        parameters=model.params,
        active_parameters=model.active,
        weights={"float32": 4.0 * model.params, "bf16": 2.0 * model.params, "8 bits": 1.0 * model.params,
                 "4 bits": model.params / 2},
        kv={cache: _cache(model, cache, load) for cache in CACHES},
        intensity=_intensity(model, found[0].stored or StoredWeights(0, 0), load),
        all_reduce=_all_reduce(model, base, load),
        schemes=tuple(schemes.values()),
        take=None if chosen is None else served(chosen, model, device, load, advice.cache),
        take_why=advice.why,
        advice=advice.rows,
        impossible={each.name: each.refused or "" for each in found if each.stored is None},
        unknown=model.unknown,
        assumptions=ASSUMPTIONS,
    )  # fmt: skip


def fitted(traffic: Traffic, model: ServedModel, name: str) -> Load:
    """The traffic with its defaults; UserError for what this model cannot do."""
    check_traffic(traffic)
    longest = model.longest
    context = traffic.context or max(
        min(CONTEXT, longest or CONTEXT), min((traffic.prompt or 0) + (traffic.output or 0), longest or sys.maxsize)
    )
    if longest is not None and context > longest:
        raise UserError(
            f"--context {context}: {name} takes {longest} tokens (max_position_embeddings)\n"
            f"hint: give --context {longest} or less"
        )
    output = traffic.output or max(1, min(OUTPUT, (context - (traffic.prompt or 0)) // 4))
    prompt = traffic.prompt or max(1, min(PROMPT, context - output))
    if prompt + output > context:
        raise UserError(
            f"--prompt {prompt} and --output {output} are {prompt + output} tokens, "
            f"more than the context of {context}\n"
            "hint: give fewer, or a larger --context"
        )
    _check_split(traffic, model)
    return Load(context, traffic.concurrency, prompt, output, traffic.tp, traffic.pp, traffic.price)


def _check_split(traffic: Traffic, model: ServedModel) -> None:
    tp, heads, kv = traffic.tp, model.heads, model.kv_heads
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (model.copied or kv % n == 0 or n % kv == 0)]
    if tp not in fitting:
        cached = "" if model.copied or kv == heads else f" and {kv} of cached keys"
        choices = ", ".join(str(n) for n in fitting if n <= 64)
        raise UserError(
            f"--tp {tp} does not divide the model's attention: {heads} heads{cached}\nhint: give one of {choices}"
        )
    if traffic.pp > model.layers:
        raise UserError(f"--pp {traffic.pp}: the model has {model.layers} layers\nhint: give {model.layers} or less")


def served(candidate: Candidate, model: ServedModel, device: Device, load: Load, cache: str = "bf16") -> SchemeServing:
    """One scheme with one format of the cache on devices of a kind."""
    weights = candidate.stored
    assert weights is not None
    share = weights.nbytes / load.devices
    room = USABLE * device.memory - share
    each = {name: model.cache_bytes(load.context, name) * model.cache_share(load.tp, load.pp) for name in CACHES}
    most = {name: max(0, int(room // size)) if size else load.concurrency for name, size in each.items()}
    fits = room >= 0 and most[cache] >= load.concurrency
    micro = math.ceil(load.concurrency / load.pp)
    context = load.prompt + load.output / 2
    first = step(model.prefill(weights, load.prompt, cache, load.tp, load.pp), device, load.tp)
    then = step(model.decode(weights, micro, context, cache, load.tp, load.pp), device, load.tp)
    ttft, token = first.seconds * load.pp, then.seconds * load.pp
    # In the time of one answer each of the sequences ends once, and another's prompt takes its turn on every device.
    prompts, answer = load.concurrency * first.seconds, load.output * token
    rate = load.concurrency * load.output / (answer + prompts)
    costs = (None, None)
    if load.price is not None:
        output = roofline.cost_per_million(load.price, load.devices, rate)
        costs = (output, output * load.output / (load.output + load.prompt))
    decode = "capacity" if not fits else "scheduler" if prompts > answer and load.concurrency > 1 else then.regime
    return SchemeServing(
        scheme=candidate.name,
        recipe=candidate.recipe,
        kv_cache=cache,
        bits=candidate.bits,
        weight_bytes=weights.nbytes,
        weight_bytes_per_device=share,
        weights_fit=room >= 0,
        fits=fits,
        max_concurrency=most,
        prefill=_phase(first, load.pp, first.regime if room >= 0 else "capacity"),
        decode=_phase(then, load.pp, decode),
        ttft_seconds=ttft,
        token_seconds=token,
        request_seconds=ttft + answer,
        decode_tokens_per_second=load.concurrency / token,
        tokens_per_second=rate,
        cost_per_million_output_tokens=costs[0],
        cost_per_million_tokens=costs[1],
        refused=candidate.refused,
        warnings=candidate.warnings,
    )


def _taken(
    found: list[Candidate], schemes: Mapping[str, SchemeServing], asked: Asked, readable: Callable[[Candidate], bool]
) -> tuple[Advice, Candidate | None]:
    """The advice, and the scheme it takes. readable: whether the engine reads the cache asked, beside a scheme."""
    advice = advise(schemes, asked)
    chosen = next((each for each in found if each.name == advice.scheme), None)
    if chosen is not None and advice.cache not in (UNQUANTIZED, OWN_CACHE) and not readable(chosen):
        advice = advise(schemes, replace(asked, cache=OWN_CACHE))
    return advice, chosen


def _phase(found: Step, stages: int, regime: str) -> PhaseTime:
    return PhaseTime(
        found.compute * stages,
        found.memory * stages,
        found.interconnect_bandwidth * stages,
        found.interconnect_latency * stages,
        found.host * stages,
        found.seconds * stages,
        regime,
    )


def _cache(model: ServedModel, cache: str, load: Load) -> CacheSize:
    lengths = sorted({SHOWN_CONTEXT, load.context})
    sizes = {str(tokens): model.cache_bytes(tokens, cache) for tokens in lengths}
    return CacheSize(model.token_bytes[cache], sizes, load.concurrency * sizes[str(load.context)])


def _intensity(model: ServedModel, weights: StoredWeights, load: Load) -> dict[str, float]:
    """FLOP per byte of weights in bf16, without attention."""
    tokens = {"prefill": (load.prompt, 1), "decode": (load.concurrency, load.concurrency)}
    return {
        name: sum(model.products(weights, each, logits).values()) / model.read_bytes(weights, each)
        for name, (each, logits) in tokens.items()
    }


def _all_reduce(model: ServedModel, base: SchemeServing, load: Load) -> AllReduce | None:
    if load.tp == 1:
        return None

    def spent(phase: PhaseTime) -> float:
        return phase.interconnect_bandwidth + phase.interconnect_latency

    return AllReduce(
        roofline.all_reduces(model.layers),
        roofline.all_reduce_bytes(model.hidden, model.layers, SERVED),
        spent(base.decode),
        spent(base.prefill),
        spent(base.decode) / base.decode.seconds,
    )


def _figures(device: Device) -> DeviceFigures:
    bandwidth = device.link.bandwidth
    return DeviceFigures(
        device.name,
        device.memory,
        USABLE * device.memory,
        device.bandwidth,
        dict(device.peaks),
        {kind: roofline.ridge(peak, device.bandwidth) for kind, peak in device.peaks.items()},
        device.link.name,
        None if math.isinf(bandwidth) else bandwidth,
        device.link.latency,
        device.source,
    )
