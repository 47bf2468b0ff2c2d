"""One step of a model over the paged cache: scheduled tokens in, logits out."""

import inspect
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.errors import UserError
from quantkit.runtime.engine.attention import NAME, Chunk, Probe, Step
from quantkit.runtime.engine.cache import CacheFormat, LayerShape, PagedCache
from quantkit.runtime.engine.gpu import Sequences
from quantkit.runtime.quant_linear import QuantLinear

TRIAL = 48  # tokens of the proof that a model runs here as it does alone
SINGLES = 8  # so many tokens of a sequence, or fewer, attend each for itself


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence from position `start` on, which lie in `blocks`; logits of the last `rows` are wanted.

    whole: tokens of the prompt it begins in, where it must attend to the bit as if all of that came in one step
    """

    tokens: list[int]
    start: int
    blocks: list[int]
    rows: int
    whole: int = 0


class Runner:
    """A model whose attention is the paged one. UserError where its attention cannot be replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        trial = None if model.config._attn_implementation == NAME else self._own_logits()
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            raise UserError(f"{type(model).__name__}: {error}") from error
        self.shapes = self._probe()
        self.windows = _windows(model)
        linears = (module for module in model.modules() if isinstance(module, QuantLinear))
        self.exact = self.device.type == "cpu" and any(each.scheme.activations for each in linears)
        self.cache: PagedCache | None = None
        self.on_gpu = self.device.type == "cuda"
        if trial is not None:
            self._prove(*trial)

    def allocate(self, blocks: int, block_size: int, form: CacheFormat) -> PagedCache:
        """Make the cache that `run` uses."""
        self.cache = PagedCache(
            self.shapes, blocks, block_size, form, self.model.dtype, self.device, tokens_first=self.on_gpu
        )
        return self.cache

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> Tensor:
        """Logits float32 [rows of all pieces in their order, V]."""
        assert self.cache is not None
        single = [len(p.tokens) <= SINGLES and not p.whole for p in pieces]
        order = sorted(range(len(pieces)), key=lambda index: not single[index])
        P, device = self.cache.block_size, self.device
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[list[int]] = []
        chunks: list[Chunk] = []
        wanted: list[range] = [range(0)] * len(pieces)
        singles = 0
        for index in order:
            piece = pieces[index]
            begin, stop = len(tokens), piece.start + len(piece.tokens)
            tokens += piece.tokens
            positions += range(piece.start, stop)
            slots += [piece.blocks[at // P] * P + at % P for at in range(piece.start, stop)]
            blocks = piece.blocks[: -(-stop // P)]
            if single[index]:
                singles = len(tokens)
                tables += [blocks] * len(piece.tokens)
            else:
                chunks.append(Chunk(begin, len(tokens), piece.start, torch.tensor(blocks, device=device), piece.whole))
            wanted[index] = range(len(tokens) - piece.rows, len(tokens))
        width = max(map(len, tables), default=0)
        position_ids = torch.tensor([positions], device=device)
        step = Step(
            self.cache,
            torch.tensor(slots, device=device),
            singles,
            torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int64, device=device),
            position_ids[0, :singles] + 1,
            max(positions[:singles], default=-1) + 1,
            chunks,
            self.windows,
            self.exact,
        )
        if self.on_gpu:
            step.sequences = self._sequences([pieces[index] for index in order])
        rows = [row for piece in wanted for row in piece]
        return self._forward(torch.tensor([tokens], device=device), position_ids, step, rows)

    def _sequences(self, pieces: list[Piece]) -> Sequences:
        """The pieces, in the order of their tokens, as Triton's kernels take them."""
        width = max(len(piece.blocks) for piece in pieces)
        starts = [0, *accumulate(len(piece.tokens) for piece in pieces)]
        table, lengths, starts_ = (
            torch.tensor(numbers, dtype=torch.int32, device=self.device)
            for numbers in (
                [piece.blocks + [0] * (width - len(piece.blocks)) for piece in pieces],
                [piece.start + len(piece.tokens) for piece in pieces],
                starts,
            )
        )
        return Sequences(table, lengths, starts_, max(len(piece.tokens) for piece in pieces))

    def _forward(self, input_ids: Tensor, position_ids: Tensor, step: Step | Probe, rows: list[int]) -> Tensor:
        keep = torch.tensor(rows, dtype=torch.int64, device=self.device)
        options = {"logits_to_keep": keep} if self._selects else {}
        out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, step=step, **options)
        logits = out.logits[0] if self._selects else out.logits[0, keep]
        return logits.float()

    @torch.inference_mode()
    def _own_logits(self) -> tuple[list[int], Tensor]:
        """A few tokens, and their logits by the model's own attention."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or TRIAL
        vocabulary: int = self.model.get_input_embeddings().num_embeddings  # type: ignore
        tokens = [(37 * at + 11) % vocabulary for at in range(min(TRIAL, context))]
        return tokens, self.model(torch.tensor([tokens], device=self.device), use_cache=False).logits[0].float()

    def _prove(self, tokens: list[int], wanted: Tensor) -> None:
        """UserError unless the same tokens in pieces, over pages, have the same logits.

        Some models mask, bias or combine their attention outside of what AttentionInterface hands on.
        """
        self.allocate(-(-TRIAL // 16), 16, CacheFormat())
        blocks = list(range(-(-TRIAL // 16)))[::-1]
        cuts = [0, len(tokens) // 2, len(tokens) * 2 // 3, len(tokens)]
        parts = [self.run([Piece(tokens[a:b], a, blocks, b - a)]) for a, b in pairwise(cuts) if b > a]
        self.cache = None
        later = slice(cuts[1], None)  # what reads from the cache
        error = ((torch.cat(parts) - wanted).norm(dim=-1) / wanted.norm(dim=-1))[later].median().item()
        # Where inputs are rounded to few bits, or all to 16, float noise moves some to another number.
        if not error < (0.003 if self.model.dtype == torch.float32 and not self.exact else 0.25):
            raise UserError(
                f"{type(self.model).__name__}: over the paged cache its logits differ from its own by {error:.0%}: its "
                "attention is not that of the paged engine\nhint: quantkit.load(...).generate(...) runs it"
            )

    @torch.inference_mode()
    def _probe(self) -> dict[int, LayerShape]:
        """The shape of each layer's keys and values, from one token through the model."""
        probe, one = Probe(), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._forward(one, one, probe, [0])
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(probe.shapes) != layers:
            raise UserError(
                f"{type(self.model).__name__}: attention of {len(probe.shapes)} of its {layers} layers goes through "
                "transformers' AttentionInterface; the paged engine needs all\nhint: use quantkit.load and generate"
            )
        return probe.shapes


def _windows(model: PreTrainedModel) -> dict[int, int]:
    """The sliding windows by layer, as far as the configuration's layer types name them."""
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
    return {layer: window for layer, kind in enumerate(kinds) if kind == "sliding_attention" and window}
