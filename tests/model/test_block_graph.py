from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import UserError
from quantkit.model.block_graph import (
    BlockGraph,
    apply_fold,
    capture_inputs,
    run_until,
    trace_block,
)
from quantkit.model.block_trial import (
    structure_key,
)
from quantkit.model.fold_search import Search
from quantkit.model.folds import Fold, LeakError, prove
from quantkit.model.matmul_tracing import evaluation
from tests.tiny_models import CONFIGS, block_inputs, tiny_model

A, M = "self_attn", "mlp"
QKV = (f"{A}.q_proj", f"{A}.k_proj", f"{A}.v_proj")
GATED = (f"{M}.gate_proj", f"{M}.up_proj")
EXPERTS = "mlp.experts"
USUAL = [QKV, (f"{A}.o_proj",), GATED, (f"{M}.down_proj",)]
V_O = ("linear", f"{A}.v_proj", (f"{A}.o_proj",))
UP_DOWN = ("linear", f"{M}.up_proj", (f"{M}.down_proj",))
LLAMA = [("norm", "input_layernorm", QKV), ("norm", "post_attention_layernorm", GATED), V_O, UP_DOWN]
GEMMA = [("norm+1", "input_layernorm", QKV), ("norm+1", "pre_feedforward_layernorm", GATED), V_O, UP_DOWN]
FUSED = [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)]
FALCON = "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
NEOX = "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
UPS = tuple(f"{EXPERTS}.gate_up_proj.{e}" for e in range(4))
DOWNS = tuple(f"{EXPERTS}.down_proj.{e}" for e in range(4))
MOE_INPUTS = [QKV, (f"{A}.o_proj",), *((up,) for up in UPS), *((down,) for down in DOWNS)]
MOE = [
    ("norm", "input_layernorm", QKV),
    ("norm", "post_attention_layernorm", UPS),
    V_O,
    *(("linear", up, (down,)) for up, down in zip(UPS, DOWNS, strict=True)),
]

# what each architecture's source says: the groups that share an input, and every fold there is
EXPECTED: dict[str, tuple[list[tuple[str, ...]], list[tuple[str, str, tuple[str, ...]]]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "stablelm", "granite"), (USUAL, LLAMA)),
    **dict.fromkeys(("gemma2", "gemma3"), (USUAL, GEMMA)),
    **dict.fromkeys(("qwen3_moe", "mixtral"), (MOE_INPUTS, MOE)),
    "olmo2": (USUAL, [V_O, UP_DOWN]),
    "cohere": (
        [QKV + GATED, (f"{A}.o_proj",), (f"{M}.down_proj",)],
        [("norm", "input_layernorm", QKV + GATED), V_O, UP_DOWN],
    ),
    "phi3": (
        FUSED,
        [
            ("norm", "input_layernorm", FUSED[0]),
            ("norm", "post_attention_layernorm", FUSED[2]),
            ("linear", FUSED[0][0], FUSED[1]),
            ("linear", FUSED[2][0], FUSED[3]),
        ],
    ),
    "gpt2": (
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        [
            ("norm", "ln_1", ("attn.c_attn",)),
            ("norm", "ln_2", ("mlp.c_fc",)),
            ("linear", "attn.c_attn", ("attn.c_proj",)),
        ],
    ),
    "gpt_neox": (
        [(name,) for name in NEOX],
        [
            ("norm", "input_layernorm", NEOX[:1]),
            ("norm", "post_attention_layernorm", NEOX[2:3]),
            ("linear", NEOX[0], NEOX[1:2]),
        ],
    ),
    "opt": (
        [QKV, (f"{A}.out_proj",), ("fc1",), ("fc2",)],
        [
            ("norm", "self_attn_layer_norm", QKV),
            ("norm", "final_layer_norm", ("fc1",)),
            ("linear", f"{A}.v_proj", (f"{A}.out_proj",)),
            ("linear", "fc1", ("fc2",)),
        ],
    ),
    "falcon": (
        [(FALCON[0], FALCON[2]), (FALCON[1],), (FALCON[3],)],
        [("norm", "input_layernorm", (FALCON[0], FALCON[2])), ("linear", FALCON[0], FALCON[1:2])],
    ),
    "falcon_new": (
        [(name,) for name in FALCON],
        [
            ("norm", "ln_attn", FALCON[:1]),
            ("norm", "ln_mlp", FALCON[2:3]),
            ("linear", FALCON[0], FALCON[1:2]),
        ],
    ),
}


@cache
def traced(name: str) -> tuple[nn.Module, tuple, dict, BlockGraph]:
    block, args, kwargs = block_inputs(tiny_model(name))
    return block, args, kwargs, trace_block(block, args, kwargs)


def run(block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    with evaluation(block):
        output = block(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


def random_scale(count: int, seed: int = 0) -> Tensor:
    return (0.4 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).exp()


def test_every_architecture_has_an_expectation() -> None:
    assert EXPECTED.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_finds_shared_inputs(name: str) -> None:
    assert traced(name)[3].inputs == EXPECTED[name][0]


@pytest.mark.parametrize("name", CONFIGS)
def test_proves_the_folds_there_are_and_no_other(name: str) -> None:
    graph = traced(name)[3]
    found = [(fold.kind, fold.producer, fold.consumers) for fold in graph.folds]
    assert sorted(found) == sorted(EXPECTED[name][1])
    assert all(fold.error < 1e-12 for fold in graph.folds)


@pytest.mark.parametrize("name", CONFIGS)
def test_covers_every_matrix_or_says_why_not(name: str) -> None:
    block, _, _, graph = traced(name)
    modules = {path for path, module in block.named_modules() if module._parameters.get("weight") is not None}
    matrices = {path for path in modules if block.get_parameter(f"{path}.weight").dim() == 2}
    stacks = {path: len(param) for path, param in block.named_parameters() if param.dim() == 3}
    experts = {f"{path}.{index}" for path, count in stacks.items() for index in range(count)}
    skipped = dict(graph.skipped)
    assert {site.name for site in graph.sites} | skipped.keys() == matrices | experts
    assert not {site.name for site in graph.sites} & skipped.keys()
    assert skipped.keys() == ({"mlp.gate"} if experts else set())
    assert all("router" in reason for reason in skipped.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_producer_is_proved_or_rejected_with_a_reason(name: str) -> None:
    block, _, _, graph = traced(name)
    norms = {path for path, module in block.named_modules() if "weight" in module._parameters}
    norms = {path for path in norms if block.get_parameter(f"{path}.weight").dim() == 1}
    accepted = {fold.producer for fold in graph.folds}
    refused = {pair.split(" -> ")[0] for pair, reason in graph.rejected if reason}
    producers = norms | {site.name.replace(f".{site.index}", ".*") for site in graph.sites}
    accepted = {name.replace(f".{graph.site(name).index}", ".*") if name not in norms else name for name in accepted}
    assert not accepted & refused
    assert producers <= accepted | refused


@pytest.mark.parametrize("name", CONFIGS)
def test_folds_hold_for_another_block_of_the_structure(name: str) -> None:
    """All folds of block 0's graph, applied one after the other to block 1, which has other weights."""
    first, _, _, graph = traced(name)
    block, args, kwargs = block_inputs(tiny_model(name), index=1)
    if name in ("gemma2", "gemma3"):  # their layers alternate between sliding and full attention
        assert structure_key(first) != structure_key(block) or name == "gemma3"
    else:
        assert structure_key(first) == structure_key(block)
    before = run(block, args, kwargs)
    for seed, fold in enumerate(graph.folds):
        apply_fold(block, graph, fold, random_scale(fold.channels, seed))
    weight = graph.folds[0].producer
    assert not torch.equal(block.get_submodule(weight.rsplit(".proj")[0]).weight, first.get_submodule(weight).weight)  # type: ignore[arg-type]
    torch.testing.assert_close(run(block, args, kwargs), before, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_site_view_is_the_matrix_of_the_product(name: str) -> None:
    """Each site's live [N, K] view maps its group's captured input to what the module computes, bias aside."""
    block, args, kwargs, graph = traced(name)
    seen: dict[int, Tensor] = {}
    run_until(block, graph, args, kwargs, seen.__setitem__)
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable:
        return lambda module, inputs, output: outputs.update({path: output.clone()})

    paths = [site.name for site in graph.sites if site.index is None]
    handles = [block.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    run(block, args, kwargs)
    for handle in handles:
        handle.remove()
    for path in paths:
        site = graph.site(path)
        expected = outputs[path].reshape(-1, outputs[path].shape[-1])
        bias = 0 if site.bias is None else block.get_parameter(site.bias)
        got = seen[graph.group_of(path)] @ site.view(block).T + bias
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert graph.sites[0].view(block).untyped_storage().data_ptr() in {
        param.untyped_storage().data_ptr() for param in block.parameters()
    }


def test_trace_leaves_the_block_alone() -> None:
    block, args, kwargs = block_inputs(tiny_model("qwen3_moe"))
    before = {name: (param, param.clone()) for name, param in block.named_parameters()}
    trace_block(block, args, kwargs)
    after = dict(block.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is param and torch.equal(param, copy) for name, (param, copy) in before.items())


def test_bfloat16_block_is_proved_in_float64() -> None:
    block, args, kwargs = block_inputs(tiny_model("gemma2").to(torch.bfloat16))
    graph = trace_block(block, args, kwargs)
    assert [fold.kind for fold in graph.folds] == ["norm+1", "norm+1", "linear", "linear"]
    assert max(fold.error for fold in graph.folds) < 1e-12


def test_grouped_query_map_and_statistics() -> None:
    *_, graph = traced("llama")  # 4 heads of 12 over 2 key-value heads
    fold = next(fold for fold in graph.folds if fold.producer.endswith("v_proj"))
    value_C = torch.arange(24.0)
    repeated = value_C.reshape(2, 1, 12).expand(2, 2, 12).flatten()
    assert torch.equal(fold.expand(value_C), repeated)
    torch.testing.assert_close(fold.reduce(repeated), value_C)


@pytest.mark.parametrize(
    ("name", "rows"), [("phi3", range(72, 96)), ("gpt2", range(96, 144)), ("falcon", range(80, 96))]
)
def test_v_rows_of_a_fused_projection(name: str, rows: range) -> None:
    *_, graph = traced(name)
    fold = next(fold for fold in graph.folds if fold.kind == "linear")
    assert fold.rows is not None
    assert fold.rows.tolist() == list(rows)


def with_reference(name: str) -> tuple[nn.Module, BlockGraph, Search]:
    block, args, kwargs, graph = traced(name)
    with evaluation(block):
        return block, graph, Search(block, graph.matrices, args, kwargs, torch.Generator().manual_seed(0))


def by_producer(graph: BlockGraph, ending: str) -> Fold:
    return next(fold for fold in graph.folds if fold.producer.endswith(ending))


WRONG: dict[str, tuple[str, str, Callable[[Fold], Fold]]] = {
    "a consumer left out": ("llama", "input_layernorm", lambda f: replace(f, consumers=f.consumers[:2])),
    "one of gate and up": ("llama", "post_attention_layernorm", lambda f: replace(f, consumers=f.consumers[:1])),
    "the router left out": ("mixtral", "post_attention_layernorm", lambda f: replace(f, routers=())),
    "an expert left out": ("mixtral", "post_attention_layernorm", lambda f: replace(f, consumers=f.consumers[1:])),
    "w for a 1 + w norm": ("gemma2", "input_layernorm", lambda f: replace(f, kind="norm")),
    "1 + w for a w norm": ("llama", "input_layernorm", lambda f: replace(f, kind="norm+1")),
    "the norm's bias left out": ("gpt2", "ln_1", lambda f: replace(f, bias=None)),
    "the linear's bias left out": ("qwen2", "v_proj", lambda f: replace(f, bias=None)),
    "heads interleaved": (
        "llama",
        "v_proj",
        lambda f: replace(f, columns=f.columns.reshape(2, 2, 12).transpose(0, 1).flatten()),  # type: ignore[union-attr]
    ),
    "gate rows for up rows": ("phi3", "gate_up_proj", lambda f: replace(f, rows=torch.arange(80))),
    "gate for up": ("llama", "up_proj", lambda f: replace(f, producer="mlp.gate_proj")),
    "a reader beyond an activation": ("gpt2", "c_attn", lambda f: replace(f, consumers=("mlp.c_fc",))),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_fold_is_refused(case: str) -> None:
    name, producer, spoil = WRONG[case]
    block, graph, search = with_reference(name)
    right = by_producer(graph, producer)
    generator = torch.Generator().manual_seed(1)
    with evaluation(block):
        assert prove(block, graph.matrices, [right], search.ordinary, generator)[0].error < 1e-12
        with pytest.raises(LeakError):
            prove(block, graph.matrices, [spoil(right)], search.ordinary, generator)


def test_a_fold_nothing_depends_on_is_not_proved() -> None:
    block, args, kwargs = block_inputs(tiny_model("llama"))
    with torch.no_grad():
        block.get_parameter("mlp.down_proj.weight").zero_()
    graph = trace_block(block, args, kwargs)
    assert not [fold for fold in graph.folds if fold.producer == "mlp.up_proj"]
    assert "nothing is proved" in dict(graph.rejected)["mlp.up_proj -> mlp.down_proj"]


def test_capture_calls_once_per_group_and_forward() -> None:
    block, args, kwargs, graph = traced("llama")
    calls: list[tuple[int, tuple[int, ...]]] = []
    with torch.no_grad(), capture_inputs(block, graph, lambda group, x_MK: calls.append((group, tuple(x_MK.shape)))):
        block(*args, **kwargs)
        block(*args, **kwargs)
    assert calls == 2 * [(0, (24, 48)), (1, (24, 48)), (2, (24, 48)), (3, (24, 80))]


def test_capture_until_stops_before_the_product() -> None:
    block, args, kwargs, graph = traced("llama")
    calls, ran = [], []
    handle = block.get_submodule("mlp.gate_proj").register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        output = run_until(block, graph, args, kwargs, lambda group, _: calls.append(group), until=2)
    handle.remove()
    assert (output, calls, ran) == (None, [0, 1, 2], [])


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_captured_by_their_own_tokens(name: str) -> None:
    block, args, kwargs, graph = traced(name)
    assert graph.stages == [(0,), (1,), (2, 3, 4, 5), (6, 7, 8, 9)]
    tokens: dict[int, int] = {}
    with torch.no_grad():
        output = run_until(block, graph, args, kwargs, lambda g, x_MK: tokens.update({g: len(x_MK)}), until=3)
    assert output is None
    assert sum(tokens.get(group, 0) for group in graph.stages[2]) == 24 * 2  # each token goes to two experts
    assert [tokens.get(group) for group in graph.stages[2]] == [tokens.get(group) for group in graph.stages[3]]


def test_experts_no_token_reached_are_sites_with_folds() -> None:
    block, args, kwargs = block_inputs(tiny_model("mixtral"), rows=1, length=1)
    graph = trace_block(block, args, kwargs)  # two of four experts run
    called: set[int] = set()
    with torch.no_grad():
        run_until(block, graph, args, kwargs, lambda group, _: called.add(group))
    assert len(called) == 2 + 2 * 2
    assert graph.inputs == MOE_INPUTS
    assert by_producer(graph, "post_attention_layernorm").consumers == UPS
    before = run(*(other := block_inputs(tiny_model("mixtral"))))
    for fold in graph.folds:
        apply_fold(other[0], graph, fold, random_scale(fold.channels))
    torch.testing.assert_close(run(*other), before, rtol=2e-4, atol=2e-4)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.w2 = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class ListOfExperts(nn.Module):
    """Experts as modules in a list, top-1 routing by an nn.Linear, as remote code still has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(16), nn.Linear(16, 12, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x).flatten(0, 1)
        score, chosen = self.gate(normed).softmax(-1).topk(1)
        out = torch.zeros_like(normed)
        for index, expert in enumerate(self.experts):
            rows = (chosen[:, 0] == index).nonzero()[:, 0]
            if len(rows):
                out[rows] = score[rows] * expert(normed[rows])
        return x + out.reshape(x.shape)


class Stack(nn.Module):
    """A list of layers one after the other: alike in name to experts, but each reads what the last one wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.unused, self.twice, self.one = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.twice(self.twice(x)) * self.one(x)


class Batched(nn.Module):
    """All experts on all tokens by one bmm, stored [E, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 16)), nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.up).relu()
        return torch.bmm(hidden, self.down).sum(0).reshape(x.shape)


def toy(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, BlockGraph, Tensor]:
    torch.manual_seed(0)
    block, x = kind().eval(), torch.randn(2, 8, 16)
    return block, trace_block(block, (x,), {}, **options), x


def test_list_of_experts() -> None:
    block, graph, x = toy(ListOfExperts)
    assert [reason for _, reason in graph.skipped] == ["router: its 12 outputs are ranked to choose experts"]
    assert graph.inputs[:2] == [("experts.0.w1", "experts.0.w3"), ("experts.1.w1", "experts.1.w3")]
    assert graph.stages == [tuple(range(12)), tuple(range(12, 24))]
    assert len(graph.sites) == 36
    assert len(graph.folds) == 1 + 12
    called: set[int] = set()
    with torch.no_grad():
        assert run_until(block, graph, (x,), {}, lambda group, _: called.add(group), until=0) is None
        assert run_until(block, graph, (x,), {}, lambda group, _: called.add(group)) is not None
    assert len(called) < 24, "some experts got no token, yet they are sites"
    before = run(block, (x,), {})
    for fold in graph.folds:
        apply_fold(block, graph, fold, random_scale(fold.channels))
    torch.testing.assert_close(run(block, (x,), {}), before)


def test_layers_in_a_row_are_no_experts() -> None:
    _, graph, _ = toy(Stack)
    assert graph.inputs == [("layers.0",), ("layers.1",), ("layers.2",)]
    assert graph.stages == [(0,), (1,), (2,)]
    reasons = dict(graph.skipped)
    assert reasons.keys() == {"unused", "twice", "one"}
    assert "no matrix product" in reasons["unused"]
    assert "2 different inputs" in reasons["twice"]
    assert "only 1 outputs" in reasons["one"]


def test_batched_experts_stored_transposed() -> None:
    block, graph, x = toy(Batched)
    assert [site.name for site in graph.sites] == [f"{p}.{e}" for p in ("up", "down") for e in range(3)]
    assert all(site.transposed for site in graph.sites)
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        run_until(block, graph, (x,), {}, seen.__setitem__)
    site = graph.site("down.1")
    up, down = (block.get_parameter(name)[1] for name in ("up", "down"))
    torch.testing.assert_close(seen[graph.group_of("down.1")], (x.flatten(0, 1) @ up).relu())
    assert torch.equal(site.view(block), down.T)


def test_block_without_matrices_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to quantize"):
        trace_block(nn.LayerNorm(8), (torch.randn(1, 4, 8),), {})


def test_scale_of_a_wrong_length_is_an_error() -> None:
    block, _, _, graph = traced("llama")
    with pytest.raises(ValueError, match="input_layernorm"):
        apply_fold(block, graph, graph.folds[0], torch.ones(3))
