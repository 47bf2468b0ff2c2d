"""Routers of every kind are left alone; what only looks like one is quantized."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantkit.model.block_graph import BlockGraph, trace_block
from quantkit.model.routing import expert_counts, has_columns

E, H, F, K = 8, 24, 16, 2  # experts, hidden size, width of an expert, experts per token

# logits [M, E] -> weights [M, E], zero where an expert is not chosen
Route = Callable[[Tensor], Tensor]


def spread(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(values).scatter(1, chosen, values.gather(1, chosen))


def top_k(logits: Tensor) -> Tensor:
    return spread(logits.softmax(-1), torch.topk(logits, K).indices)


def sigmoid_bias_groups(logits: Tensor) -> Tensor:  # DeepSeek-V3
    scores = logits.sigmoid()
    biased = scores + torch.linspace(0, 0.1, E)
    best = biased.view(-1, 4, E // 4).topk(2)[0].sum(-1).topk(2, sorted=False)[1]
    mask = torch.zeros(len(logits), 4).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    return spread(scores, biased.masked_fill(~mask.bool(), 0).topk(K)[1])


def kthvalue(logits: Tensor) -> Tensor:
    limit = torch.kthvalue(logits, E - K + 1, dim=-1, keepdim=True).values
    return logits.sigmoid().where(limit <= logits, torch.zeros(()))


def argsort(logits: Tensor) -> Tensor:
    return spread(logits.sigmoid(), logits.argsort(dim=-1, descending=True)[:, :K])


def max_dim(logits: Tensor) -> Tensor:  # Switch
    value, index = torch.max(logits.softmax(-1), dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, index, value)


def amax_compared(logits: Tensor) -> Tensor:
    return logits.sigmoid() * (logits == logits.amax(-1, keepdim=True))


def one_hot(logits: Tensor) -> Tensor:
    return nn.functional.one_hot(logits.argmax(-1), E) * logits.sigmoid()


def counted(logits: Tensor) -> Tensor:  # rank = how many are larger
    return logits.sigmoid() * ((logits.unsqueeze(-1) < logits.unsqueeze(-2)).sum(-1) < K)


def threshold(logits: Tensor) -> Tensor:
    return torch.stack([column * (column > 0.1) for column in logits.unbind(-1)], -1)


def nonzero(logits: Tensor) -> Tensor:
    token, expert = torch.nonzero(logits.relu(), as_tuple=True)
    weights = torch.zeros_like(logits)
    weights[token, expert] = logits[token, expert]
    return weights


def multinomial(logits: Tensor) -> Tensor:
    return spread(logits, torch.multinomial(logits.softmax(-1), K, generator=torch.Generator().manual_seed(0)))


def in_place(logits: Tensor) -> Tensor:
    scores = torch.empty(len(logits), E + 4)
    scores[:, :E].copy_(logits)
    scores[:, E:] = -9.0
    scores.sub_(scores.mean()).sort(dim=-1, descending=True)
    return spread(logits, scores.sort(dim=-1, descending=True)[1][:, :K])


def expert_choice(logits: Tensor) -> Tensor:
    scores = logits.softmax(-1).t()
    chosen = scores.topk(4, dim=-1).indices
    return torch.zeros_like(scores).scatter_(1, chosen, scores.gather(1, chosen)).t()


def hashed(logits: Tensor) -> Tensor:  # which experts is fixed by the tokens' places: their weights are taken
    chosen = torch.stack([torch.arange(len(logits)) % E, (torch.arange(len(logits)) * 3 + 1) % E], -1)
    return spread(logits.softmax(-1), chosen)


def taken(logits: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    weights = torch.zeros_like(logits)
    weights[rows, rows % E] = logits[rows, rows % E]
    return weights


ROUTES: dict[str, Route] = {
    route.__name__: route
    for route in (
        top_k,
        sigmoid_bias_groups,
        kthvalue,
        argsort,
        max_dim,
        amax_compared,
        one_hot,
        counted,
        threshold,
        nonzero,
        multinomial,
        in_place,
        expert_choice,
        hashed,
        taken,
    )
}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, F, bias=False), nn.Linear(F, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    """Norm, router, experts; the rows beyond E of the router are `more`."""

    def __init__(self, route: Route, kind: str = "list", more: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.route, self.kind = route, kind
        self.norm, self.router = nn.RMSNorm(H), nn.Linear(H, E + more, bias=False)
        if kind == "list":
            self.experts = nn.ModuleList(Expert() for _ in range(E))
        elif kind == "named":
            self.experts = nn.ModuleDict({f"expert_{e}": Expert() for e in range(E)})
        else:
            shapes = {"stacked": (E, F, H), "flat": (E * F, H)}
            self.up = nn.Parameter(torch.randn(shapes[kind]) / H**0.5)
            self.down = nn.Parameter(torch.randn(E, H, F) / F**0.5 if kind == "stacked" else torch.randn(E * H, F))
        self.requires_grad_(False)

    def expert(self, e: int, x: Tensor) -> Tensor:
        if self.kind == "list":
            return self.experts[e](x)
        if self.kind == "named":
            return self.experts[f"expert_{e}"](x)
        up, down = self.up.view(E, F, H), self.down.view(E, H, F)
        return nn.functional.linear(nn.functional.linear(x, up[e]).relu(), down[e])

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden).reshape(-1, H)
        weights = self.route(self.router(x))
        result = torch.zeros_like(x)
        for e in range(E):
            token = weights[:, e].nonzero()[:, 0]
            if len(token):
                result.index_add_(0, token, self.expert(e, x[token]) * weights[token, e, None])
        return hidden + result.reshape(hidden.shape)


def trace(block: nn.Module) -> BlockGraph:
    torch.manual_seed(1)
    return trace_block(block.eval(), (torch.randn(1, 17, H),), {}, folds=False)


@pytest.mark.parametrize("name", ROUTES)
def test_a_router_is_found_whichever_way_it_ranks(name: str) -> None:
    graph = trace(Block(ROUTES[name]))
    assert ("router", f"router: its {E} outputs are ranked to choose experts") in graph.skipped
    assert len(graph.sites) == 2 * E


@pytest.mark.parametrize("kind", ["named", "stacked", "flat"])
@pytest.mark.parametrize("name", ["top_k", "hashed", "kthvalue"])
def test_however_its_experts_are_kept(kind: str, name: str) -> None:
    graph = trace(nn.Sequential(Block(ROUTES[name], kind), Sparse()))
    assert [name for name, reason in graph.skipped if reason.startswith("router")] == ["0.router"]


def test_rows_that_stand_for_no_expert() -> None:
    """Zero-computation experts are ranked among the others; a shared expert's gate is cut off before."""

    def null_experts(logits: Tensor) -> Tensor:
        chosen = logits.topk(K).indices
        return torch.zeros_like(logits).scatter(1, chosen, logits.softmax(-1))[:, :E]

    def with_gate(logits: Tensor) -> Tensor:
        return top_k(logits[:, :E]) * logits[:, E:].sigmoid()

    for route, more in ((null_experts, 4), (with_gate, 1)):
        assert [name for name, _ in trace(Block(route, more=more)).skipped] == ["router"]


class Attention(nn.Module):
    """Softmaxed scores, and an indexer that ranks positions by few heads; E rows are the rows of experts beside it."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(H, E, bias=False) for _ in range(3))
        self.index_q, self.index_k = nn.Linear(H, heads * 4, bias=False), nn.Linear(H, 4, bias=False)
        self.index_weights, self.o = nn.Linear(H, heads, bias=False), nn.Linear(E, H, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = torch.einsum("bthd,bsd->bths", self.index_q(x).unflatten(-1, (self.heads, 4)), self.index_k(x))
        index = (scores.relu() * self.index_weights(x).unsqueeze(-1)).sum(2).topk(4, dim=-1).indices
        mask = torch.full(index.shape[:2] + index.shape[1:2], float("-inf")).scatter(-1, index, 0.0)
        return self.o((q @ k.mT + mask).softmax(-1) @ v)


class Sparse(nn.Module):
    """An MLP that keeps the largest activations only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 48, bias=False), nn.Linear(48, H, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(up * (up >= up.topk(8).values[..., -1:]))


class Whole(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp, self.moe = parts

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden)
        return self.moe(hidden + self.mlp(hidden))


def test_what_ranks_without_a_row_per_expert_is_quantized() -> None:
    graph = trace(Whole(Attention(heads=12), Sparse(), Block(top_k)))
    assert [name for name, reason in graph.skipped if "router" in reason] == ["moe.router"]
    names = {site.name for site in graph.sites}
    assert {f"attention.{leaf}" for leaf in ("q", "k", "v", "o", "index_q", "index_weights")} <= names
    assert {"mlp.up", "mlp.down"} <= names


def test_heads_of_an_indexer_as_many_as_experts() -> None:
    graph = trace(Whole(Attention(heads=E), Sparse(), Block(top_k)))
    assert [name for name, reason in graph.skipped if "router" in reason] == ["moe.router"]


class ProductKeys(nn.Module):
    """Experts in a table, chosen by the best pairs of two halves of the logits (PEER, Doge)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(H, 2 * 8, bias=False), nn.Embedding(64, H)
        self.up, self.down = nn.Linear(H, 32, bias=False), nn.Linear(32, H, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        (score_x, score_y), (x_index, y_index) = self.router(x).unflatten(-1, (2, 8)).movedim(-2, 0).topk(4)
        score, place = (score_x.unsqueeze(-1) + score_y.unsqueeze(-2)).flatten(-2).topk(K)
        index = (x_index.unsqueeze(-1) * 8 + y_index.unsqueeze(-2)).flatten(-2).gather(-1, place)
        return x + self.down(self.up(x)) + (self.experts(index) * score.softmax(-1).unsqueeze(-1)).sum(-2)


def test_experts_in_a_table() -> None:
    assert [name for name, _ in trace(ProductKeys()).skipped if name == "router"] == ["router"]
    assert [site.name for site in trace(ProductKeys()).sites] == ["up", "down"]


def test_no_expert_no_router() -> None:
    graph = trace(Sparse())
    assert [site.name for site in graph.sites] == ["up", "down"]


def test_counts_of_experts() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(5)), "conv": nn.Conv1d(7, 7, 3)})
    assert expert_counts(block, set(), set()) == {5}
    assert expert_counts(block, {3}, set()) == {3, 5}
    assert has_columns((17, 4, 2), 8)
    assert has_columns((1, 8, 17), 8)
    assert not has_columns((1, 17, 17), 8)
