"""Memory and spilled states of a run. Sizes of tensors come from the code that makes them; here they are added up.

A run's peak is what it holds all the time (libraries, a block, calibration states) and the fullest phase of a block:
running it, gathering statistics, quantizing a group. What of the first is in the heap stays there for the others.

Shapes: N = out features (of all linears of a group), K = in features, H = hidden size.
"""

from dataclasses import dataclass

from quantkit.algorithms import awq, gptq
from quantkit.planner.linear_groups import Group, PlannedLinear, grouped, halted, staged
from quantkit.planner.model_inventory import ModelInventory
from quantkit.quantization import held_out
from quantkit.quantization.calibration.hidden_states import batch_samples
from quantkit.quantization.calibration.spill import STATES_LIMIT
from quantkit.quantization.calibration.statistics import OutputDrift, Statistic
from quantkit.quantization.gguf_measured import compared_samples
from quantkit.quantization.output_divergence import OutputDivergence
from quantkit.quantization.resources import resident_bytes
from quantkit.recipe.gguf import Measured
from quantkit.recipe.recipe import Recipe
from quantkit.report.plan import CalibrationSize

LOADED = 28 << 20  # bytes that libraries take beyond their import, once they have computed
TOKENIZED = 20 << 20  # and once a text was tokenized
THREAD = 12 << 20  # and of buffers for products in each thread that a batch is halted in
FLOAT = 4  # bytes; everything is computed in float32

Phase = list[float]


@dataclass(slots=True)
class MemoryEstimate:
    """Bytes of memory by what holds them, and bytes of states that go to a file in the output folder."""

    memory: dict[str, float]
    spilled: float = 0.0

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True)
class Batches:
    """How much calibration text there is and how much of it runs at a time, in tokens."""

    tokens: int
    batch: int


def need(
    recipe: Recipe, inventory: ModelInventory, jobs: list[PlannedLinear], process: int, text: CalibrationSize | None
) -> MemoryEstimate:
    """Memory and spilled states of the whole run, at its worst block.

    process: bytes it starts with; text: how much calibration text there is.
    """
    blocks, H = grouped(jobs), inventory.hidden_size
    libraries = process + LOADED + (TOKENIZED if text else 0)
    held = max(inventory.blocks) * (FLOAT if text else inventory.dtype.itemsize)
    result = MemoryEstimate({"python and libraries": libraries, "weights of one block": held})
    memory = result.memory
    if text is None:
        memory["rounding one linear"] = resident_bytes([_rounding(group) for groups in blocks for group in groups])
        return result

    def array(size: float) -> float:
        spills = size > STATES_LIMIT
        result.spilled += size if spills else 0
        return 0.0 if spills else size

    tokens, batch = text.tokens, min(batch_samples(H, text.seq_len), text.samples) * text.seq_len
    refits = recipe.propagate == "quantized" and any(group.refits for groups in blocks for group in groups)
    memory["calibration states"] = sum(array(FLOAT * tokens * H) for _ in range(1 + refits))
    if refits:
        worst = max(blocks, key=lambda groups: sum(group.K for group in groups if group.refits))
        memory["inputs of the original model"] = sum(array(FLOAT * tokens * group.K) for group in worst if group.refits)
    stops = halted(recipe, blocks, inventory, tokens)
    if stops:
        memory["python and libraries"] += -(-tokens // batch) * THREAD
    unseen = held_out.windows_for(text.samples, text.seq_len) * text.seq_len
    memory["held-out text"] = sum(held_out.stream_sizes(unseen, H))
    working = [
        resident_bytes(_phases(recipe, groups, inventory, Batches(tokens, batch), refits, stops)) for groups in blocks
    ]
    vocabulary = inventory.config.get_text_config().vocab_size
    logits = held_out.logits_sizes(unseen, vocabulary, H, inventory.dtype.itemsize)
    memory["running and quantizing one block"] = max(*working, resident_bytes([logits]) - held)
    if recipe.gguf is not None and isinstance(recipe.gguf.mix, Measured):
        measuring = {"python and libraries": libraries} | _measuring(inventory, text)
        result.memory = max(memory, measuring, key=lambda parts: sum(parts.values()))
    return result


def _measuring(inventory: ModelInventory, text: CalibrationSize) -> dict[str, float]:
    """Before the blocks, where types are chosen by measured harm: the whole model, and all of it rounded."""
    vocabulary = inventory.config.get_text_config().vocab_size
    samples = min(text.samples, compared_samples(vocabulary, text.seq_len))
    output = OutputDivergence.sizes(samples, text.seq_len, vocabulary, inventory.hidden_size)
    each = FLOAT + inventory.dtype.itemsize
    return {
        "the whole model, and as stored": float(each * sum(inventory.params.values())),
        "its output, to measure types by": resident_bytes([output]),
    }


def _phases(
    recipe: Recipe, groups: list[Group], inventory: ModelInventory, text: Batches, refits: bool, stops: bool
) -> list[Phase]:
    """Sizes of the tensors alive in each phase of a block."""
    H, batch = inventory.hidden_size, text.batch
    steps = _running(groups, inventory, batch)
    running, phases = max(steps, key=sum), [*steps]
    names = {transform.name for transform in recipe.transforms}
    stack = [FLOAT * N * group.K for group in groups for N in group.rows]
    if names:  # folds and rotations are proved in float64, a matrix or a fold at a time
        phases.append([2 * size for size in stack])
    if "awq" in names:
        hessians = [size for group in groups for size in Statistic.sizes(group.K, hessian=True)]
        weights = max(FLOAT * group.N * group.K for group in groups)
        phases.append([*hessians, *awq.working_sizes()])
        phases.append([*hessians, *running, weights, weights])  # the block's loss with a finalist in their place
    if "smoothquant" in names:
        phases.append([*running, *stack, FLOAT * batch * max(group.K for group in groups)])
    stages = [[group] for group in groups] if stops else _stages(recipe, groups)
    for index, stage in enumerate(stages):
        halting, before = ([], []) if not stops else (_halted(groups, index, H, text), _before(groups, index, H, text))
        gathered = [size for group in stage for size in _statistics(group)]
        drifts = [
            size for group in stage if refits and group.refits for size in OutputDrift.sizes(group.N, group.K, batch)
        ]
        phases += [[*before, *step, *gathered] for step in (steps[:index] if stops else steps)]
        phases.append([*halting, *gathered, *drifts, *([] if stops else running)])
        phases += [[*halting, *gathered, *_quantizing(group, refits)] for group in stage]
        if recipe.kv_cache is not None:  # its scales are found by one more run, before the halted ones go on
            phases.append([*halting, *running])
    return phases


def _stages(recipe: Recipe, groups: list[Group]) -> list[list[Group]]:
    """Groups whose statistics are gathered at once."""
    if not staged(recipe, groups):
        return [groups]
    experts = [group for group in groups if group.expert]
    return [[group] for group in groups if not group.expert] + ([experts] if experts else [])


def _running(groups: list[Group], inventory: ModelInventory, batch: int) -> list[Phase]:
    """One batch inside the block, behind each group: two hidden states, the group's outputs, what is made of them.

    Keys and queries are rotated: outputs of an attention are there twice. Experts see their share of the tokens.
    """
    H, steps = inventory.hidden_size, list[Phase]()
    for index, group in enumerate(groups):
        tokens = batch * (inventory.active if group.expert else 1)
        outputs = group.rows * (2 if group.attention and len(group.rows) > 1 else 1)
        made = groups[index + 1].K if index + 1 < len(groups) else 0
        steps.append([*(FLOAT * batch * H for _ in range(2)), *(FLOAT * tokens * N for N in (*outputs, made))])
    return steps


def _halted(groups: list[Group], index: int, H: int, text: Batches) -> Phase:
    """What all batches hold that are halted at a group: two hidden states, its input, and an attention's parts."""
    group, before = groups[index], groups[index - 1]
    inside = before.rows if index and group.attention and before.attention else []
    return [
        FLOAT * text.batch * width for _ in range(-(-text.tokens // text.batch)) for width in (H, H, group.K, *inside)
    ]


def _before(groups: list[Group], index: int, H: int, text: Batches) -> Phase:
    """What all batches but the one that runs hold while they run up to group `index`."""
    sizes = _halted(groups, index, H, text)
    return sizes[: len(sizes) - len(sizes) // -(-text.tokens // text.batch)]


def _statistics(group: Group) -> Phase:
    return [float(size) for size in Statistic.sizes(group.K, hessian=group.gptq is not None, block=group.block)]


def _quantizing(group: Group, refits: bool) -> Phase:
    if group.gptq is None:
        return _rounding(group)
    drift = refits and group.refits
    sizes = gptq.working_sizes(group.N, group.K, group.gptq.model_dump(), drift=drift)
    return [float(size) for size in sizes]


def _rounding(group: Group) -> Phase:
    """One linear at a time: as it is read, codes, and codes in words that are packed."""
    largest = max(group.rows) * group.K
    return [2.0 * largest, 2.0 * largest, 4.0 * largest]
