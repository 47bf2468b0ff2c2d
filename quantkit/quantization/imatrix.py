"""An importance matrix of a model for llama.cpp's tools: E[x^2] of each linear's input, as the original model runs.

The blocks are read one by one, as in a run, but nothing is quantized: the states behind each block are the original
model's. The head's input is the output of the final norm; a tied head's goes under the name of the embedding.

Shapes: S = windows, T = tokens of a window, K = input features of a linear.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.device_names import torch_device
from quantkit.errors import UserError
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from quantkit.formats.gguf.tensor_names import Place, architecture, places
from quantkit.model.block_graph import BlockGraph, trace_block
from quantkit.model.block_trial import once_per_structure
from quantkit.model.meta_model import build_meta_model, read_config
from quantkit.model.model_ends import head_inputs
from quantkit.model.streamed_model import StreamedModel, release
from quantkit.model.ties import equal_tensors, settle_ties
from quantkit.model.weight_sources import linear_names, weight_sources
from quantkit.progress import Mode, Progress
from quantkit.quantization.calibration import hidden_states as cal
from quantkit.quantization.calibration.data import CalibrationTokens, token_batches
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.quantization.calibration.widest import widest_input
from quantkit.quantization.early_checks import check_before_torch
from quantkit.quantization.resources import return_pages, reuse_pages
from quantkit.recipe.recipe import Recipe
from quantkit.report.conversion_record import ImatrixReport

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def make_imatrix(
    recipe: Recipe, output: Path, *, device: str = "auto", trust_remote_code: bool = False, progress: Mode = True
) -> ImatrixReport:
    """Write the importance matrix of recipe.model on its calibration text: GGUF, or the older form for a .dat.

    UserError for bad input and for an architecture that has no GGUF names here, before any weight is read.
    """
    folder = check_before_torch(recipe, output, device=device)
    checkpoint = Checkpoint.open(folder)
    architecture(checkpoint.config)
    named = places(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    with Progress(progress) as bar:
        bar.stage("loading model")
        reuse_pages()
        streamed, tokens = _prepare(recipe, checkpoint, torch_device(device), trust_remote_code)
        samples, seq_len = tokens.ids_ST.shape
        bar.stage(
            f"{samples} x {seq_len} = {samples * seq_len:,} tokens of {' + '.join(s.name for s in tokens.sources)}"
        )
        found = gather(streamed, tokens.ids_ST, named, bar)
    sources = tuple(source.name for source in tokens.sources)
    matrix = Imatrix(dict(sorted(found.items())), sources, samples, seq_len)
    write_imatrix(output, matrix)
    return ImatrixReport(str(output), len(found), samples, seq_len, sources, dict(matrix.unreached))


def gather(
    streamed: StreamedModel,
    ids_ST: Tensor,
    named: dict[str, Place],
    bar: Progress,
    observe: Callable[[str, Statistic], None] | None = None,
) -> dict[str, ImatrixEntry]:
    """Sums of x^2 and token counts of every linear's input and of the head's, by GGUF tensor name.

    observe  is shown the GGUF name of each linear in a block and the statistic of its input, with its Hessian
    """
    graphs = once_per_structure(
        streamed, lambda _, block, hidden, call: trace_block(block, (hidden, *call.args), call.kwargs, folds=False)
    )
    found: dict[str, ImatrixEntry] = {}
    with tempfile.TemporaryDirectory(prefix="quantkit-imatrix-") as folder:
        states = cal.HiddenStates(streamed, ids_ST, Path(folder))
        bar.begin(len(streamed.blocks))
        for index, graph in enumerate(graphs):
            statistics = _block(streamed, states, graph, index, hessian=observe is not None)
            _add(found, streamed, graph, index, statistics, named, observe)
            bar.advance()
        head = HEAD if any(place.tensor == HEAD for place in named.values()) else EMBEDDING
        if (statistic := _head(streamed, states)) is not None:
            found[head] = _entry(1, len(statistic.square_sum_K))
            _put(found[head], 0, statistic)
    return found


def _prepare(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device, trust_remote_code: bool
) -> tuple[StreamedModel, CalibrationTokens]:
    """The meta model over its checkpoint, computed in float32 at least, and the tokens."""
    assert recipe.calibration is not None, "an importance matrix is made of calibration text"
    config = read_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    tokens = token_batches(
        recipe.calibration,
        locate_tokenizer(checkpoint.folder, trust_remote_code),
        max_positions=getattr(text, "max_position_embeddings", None),
        widest=widest_input(model, recipe),
        vocabulary=getattr(text, "vocab_size", None),
    )
    sources = weight_sources(model, checkpoint.tensors)
    settle_ties(model, sources, lambda one, other: equal_tensors(checkpoint, one, other, checkpoint.dtype))
    compute = torch.promote_types(checkpoint.dtype, torch.float32) if device.type == "cpu" else checkpoint.dtype
    return StreamedModel(model, sources, checkpoint, compute, device), tokens


def _block(
    streamed: StreamedModel, states: cal.HiddenStates, graph: BlockGraph, index: int, *, hessian: bool
) -> dict[int, Statistic]:
    """What reached each input group of a block that any token reached; the states are those behind it afterwards."""
    statistics: dict[int, Statistic] = {}

    def observe(group: int, tokens: slice, x_MK: Tensor) -> None:
        if group not in statistics:
            statistics[group] = Statistic.empty(x_MK, hessian=hessian)
        statistics[group].add(x_MK)

    block = streamed.fill(index)
    cal.run(states, block, graph, index, set(range(len(graph.inputs))), observe, advance=True)
    for statistic in statistics.values():
        statistic.finish()
    release(block)
    return_pages()
    return statistics


def _head(streamed: StreamedModel, states: cal.HiddenStates) -> Statistic | None:
    """What reached the head; None where the model's head is not a linear."""
    statistic: Statistic | None = None
    for part in states.slices:
        inputs = head_inputs(streamed, states.hidden_STH[part])
        if inputs is None:
            return None
        x_MK = inputs.reshape(-1, inputs.shape[-1])
        statistic = statistic or Statistic.empty(x_MK, hessian=False)
        statistic.add(x_MK)
    return statistic


def _add(
    found: dict[str, ImatrixEntry],
    streamed: StreamedModel,
    graph: BlockGraph,
    index: int,
    statistics: dict[int, Statistic],
    named: dict[str, Place],
    observe: Callable[[str, Statistic], None] | None,
) -> None:
    """Put a block's statistics where its linears' GGUF names say."""
    experts: dict[str, int] = {}
    for place in named.values():
        if place.expert is not None:
            experts[place.tensor] = max(experts.get(place.tensor, 0), place.expert + 1)
    for site in graph.sites:
        group, K = graph.group_of(site.name), site.view(streamed.blocks[index]).shape[1]
        for name, _ in linear_names(streamed.sources, streamed.prefix(index).rstrip("."), site):
            place = named.get(f"{name}.weight")
            if place is None:
                raise UserError(f"{name}: this linear has no name in a GGUF file, so no entry can be written for it")
            entry = found.setdefault(place.tensor, _entry(experts.get(place.tensor, 1), K))
            if group in statistics:
                _put(entry, place.expert or 0, statistics[group])
                if observe is not None:
                    observe(place.tensor, statistics[group])


def _entry(matrices: int, K: int) -> ImatrixEntry:
    return ImatrixEntry(np.zeros((matrices, K), np.float32), np.zeros(matrices, np.float32))


def _put(entry: ImatrixEntry, row: int, statistic: Statistic) -> None:
    entry.sums[row] = statistic.square_sum_K.float().cpu().numpy()
    entry.counts[row] = statistic.count
