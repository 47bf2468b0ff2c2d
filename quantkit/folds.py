"""Which per-channel scales can move from a producer into its readers, found by trial and proved by comparing outputs.

A fold divides a producer's output channels by a positive scale (a norm's weight, rows of a linear) and multiplies the
input columns of all linears that read it. Nothing is looked up:

1. Discovery. Run the block in float64, multiply one producer's output by scales that all differ, and look at the input of
   every later product. Equal to the original: not affected. Original times a permutation of the scales, column by
   column: a reader, and the permutation says which channel each column reads (so grouped-query attention, which repeats
   v, needs no special case); it is fed the original, as if its columns had been divided. Anything else: no fold.
2. Proof. Write the fold with other random scales into float64 copies of the parameters it touches, run the block as it
   is, compare its outputs. A control without the readers' half must change the outputs, else nothing was proved.

Shapes: M = tokens, C = channels a fold scales, K = in features of its readers, N = out features of a producer.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from quantkit.products import Float64, Products, Site, Weight, evaluation, widen, without_cache

MATCH = 1e-8  # of a column's largest value; wrong scales differ by 1e-5 and more, float64 sums by 1e-13
PROOF = 1e-9  # of a token's output norm
CONTROL = 1e-6  # the producer's half alone must change the output by more


@dataclass(frozen=True, eq=False)
class Fold:
    """A proved pair. kind: "norm" (weight w), "norm+1" (the norm multiplies by 1 + w) or "linear".

    producer   module path of the norm, or the site name of the linear
    consumers  site names whose columns are multiplied; routers: matrices that are not quantized but read it too
    channels   C, the length of the scale
    rows       int64 [C], the producer's output channels that are scaled; None: all of them, in order
    columns    int64 [K], the scale each input column of the consumers takes; None: column k takes scale k
    bias       parameter path of the producer's bias
    error      largest relative change of the block's output measured in the proof
    """

    producer: str
    kind: str
    consumers: tuple[str, ...]
    routers: tuple[str, ...]
    channels: int
    rows: Tensor | None = None
    columns: Tensor | None = None
    bias: str | None = None
    error: float = 0.0

    def expand(self, scale_C: Tensor) -> Tensor:
        """The factor of each input column of the consumers, [K]."""
        return scale_C if self.columns is None else scale_C[self.columns.to(scale_C.device)]

    def reduce(self, value_K: Tensor) -> Tensor:
        """The mean over the columns that share a channel, [C]: what one scale can know of a statistic of its columns."""
        if self.columns is None:
            return value_K
        columns = self.columns.to(value_K.device)
        total_C = value_K.new_zeros(self.channels).index_add_(0, columns, value_K)
        return total_C / torch.bincount(columns, minlength=self.channels).clamp(min=1)


def scale_producer(block: nn.Module, sites: Mapping[str, Site], fold: Fold, scale_C: Tensor) -> None:
    """Divide the producer's channels by scale_C, in place."""
    bias = None if fold.bias is None else block.get_parameter(fold.bias).data
    if fold.kind == "linear":
        w_NK = sites[fold.producer].view(block)
        rows = slice(None) if fold.rows is None else fold.rows.to(w_NK.device)
        scale_C = scale_C.to(w_NK)
        w_NK[rows] = w_NK[rows] / scale_C[:, None]
        if bias is not None:
            bias[rows] = bias[rows] / scale_C
        return
    w_C = block.get_parameter(f"{fold.producer}.weight").data
    offset = 1.0 if fold.kind == "norm+1" else 0.0
    wide_C = torch.promote_types(w_C.dtype, torch.float32)
    w_C.copy_((w_C.to(wide_C) + offset) / scale_C.to(w_C.device, wide_C) - offset)
    if bias is not None:
        bias.div_(scale_C.to(bias))


def scale_consumers(block: nn.Module, sites: Mapping[str, Site], fold: Fold, scale_C: Tensor) -> None:
    """Multiply the columns of everything that reads the producer, in place."""
    for name in (*fold.consumers, *fold.routers):
        w_NK = sites[name].view(block)
        w_NK.mul_(fold.expand(scale_C).to(w_NK))


@dataclass(frozen=True, eq=False)
class Reference:
    """One float64 run: (site name, input [M, K]) of each product in order, the floating outputs, and what norms did."""

    args: tuple
    kwargs: dict
    products: list[tuple[str, Tensor]]
    outputs: list[Tensor]
    norms: dict[str, list[tuple[tuple, Tensor]]]


class _Leak(Exception):
    """A scaled channel reaches something that a fold cannot undo. seen: K of the input it showed in, 0 for the output."""

    def __init__(self, where: str, reason: str, seen: int = 0) -> None:
        super().__init__(reason)
        self.where, self.seen = where, seen


def find_folds(
    block: nn.Module, sites: Mapping[str, Site], quantizable: set[str], args: tuple, kwargs: dict, *, seed: int = 0
) -> tuple[list[Fold], list[tuple[str, str]]]:
    """All proved folds of the block and, for each other producer, ("producer -> reader", why not).

    `sites` are all matrices by name, `quantizable` those that may be scaled for their own sake (the others are routers).
    Costs about two runs of the block per producer and two per fold, in float64, on the tokens given; a few will do.
    Parameters are swapped for float64 copies while a fold is being proved: those of one fold at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = without_cache(args, kwargs)
    folds: list[Fold] = []
    rejected: list[tuple[str, str]] = []
    with evaluation(block):
        search = _Search(block, sites, args, kwargs, generator)
        for name, attempt in search.attempts(quantizable):
            try:
                candidates = attempt()
                folds.extend(prove(block, sites, candidates, search.ordinary, generator))
            except _Leak as leak:
                rejected.append((f"{name} -> {leak.where}", str(leak)))
    return folds, rejected


class _Search:
    """The runs that find candidates for one block."""

    def __init__(
        self, block: nn.Module, sites: Mapping[str, Site], args: tuple, kwargs: dict, generator: torch.Generator
    ) -> None:
        self.block, self.sites, self.generator = block, sites, generator
        self.names = {(site.param, site.index): site.name for site in sites.values()}
        self.families: dict[str, list[str]] = {}
        for name in sites:
            self.families.setdefault(family(name), []).append(name)
        self.norms = {
            path: module
            for path, module in block.named_modules()
            if (own := dict(module.named_parameters(recurse=False)))
            and own.keys() <= {"weight", "bias"}
            and "weight" in own
            and all(p.dim() == 1 for p in own.values())
        }
        self.ordinary = self.refer(args, kwargs)
        self._alike: Reference | None = None

    @property
    def alike(self) -> Reference:
        """The run where all positions hold the first token: attention then returns v itself, whatever q and k are."""
        if self._alike is None:
            args, kwargs = self.ordinary.args, dict(self.ordinary.kwargs)
            if args:
                args = (args[0][:, :1].expand_as(args[0]).contiguous(), *args[1:])
            else:
                x = kwargs["hidden_states"]
                kwargs["hidden_states"] = x[:, :1].expand_as(x).contiguous()
            self._alike = self.refer(args, kwargs)
        return self._alike

    def refer(self, args: tuple, kwargs: dict) -> Reference:
        args, kwargs = tree_map(widen, args), tree_map(widen, kwargs)
        products: list[tuple[str, Tensor]] = []
        norms: dict[str, list[tuple[tuple, Tensor]]] = {path: [] for path in self.norms}

        def on_product(weight: Weight, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            products.append((self.name_of(weight), x.reshape(-1, x.shape[-1]).clone()))
            return run(x)

        def keep(path: str) -> Callable:
            return lambda module, inputs, output: norms[path].append((inputs, output))

        handles = [module.register_forward_hook(keep(path)) for path, module in self.norms.items()]
        try:
            with Float64(), Products(self.block, on_product):
                outputs = floating(self.block(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        return Reference(args, kwargs, products, outputs, norms)

    def name_of(self, weight: Weight) -> str:
        return self.names.get((weight.param, weight.index), weight.param)

    def attempts(self, quantizable: set[str]) -> Iterator[tuple[str, Callable[[], list[Fold]]]]:
        ran = {name for name, _ in self.ordinary.products}
        for path in self.norms:
            yield path, lambda path=path: self.from_norm(path, quantizable)
        for key, members in self.families.items():
            alive = [name for name in members if name in ran]
            if alive and alive[0] in quantizable:
                label = members[0] if len(members) == 1 else key
                yield label, lambda alive=alive, members=members: self.from_linear(alive, members, quantizable)

    def from_norm(self, path: str, quantizable: set[str]) -> list[Fold]:
        runs = self.ordinary.norms[path]
        if len(runs) != 1 or not isinstance(runs[0][1], Tensor):
            raise _Leak("nothing", f"the norm ran {len(runs)} times on the trial tokens, not once")
        (inputs, output), module = runs[0], self.norms[path]
        C = len(module.get_parameter("weight"))
        if output.shape[-1] != C:
            raise _Leak("nothing", f"its output has {output.shape[-1]} channels, its weight {C}")
        kind = norm_kind(module, inputs, output, distinct_scales(C, self.generator, output))
        scale_C = distinct_scales(C, self.generator, output)
        found = self.readers(self.ordinary, scale_C, None, {path: None})
        bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
        ran = {name for name, _ in self.ordinary.products}
        names = set(found)  # and their siblings that no trial token reached
        names |= {name for reader in found for name in self.families[family(reader)] if name not in ran}
        for reader, columns_K in found.items():
            if not torch.equal(columns_K, torch.arange(C, device=columns_K.device)):
                raise _Leak(reader, "reads the channels of a norm in another order")
        consumers = tuple(name for name in self.sites if name in names and name in quantizable)
        if not consumers:
            raise _Leak("nothing", "no quantized linear reads its output")
        routers = tuple(name for name in self.sites if name in names and name not in quantizable)
        return [Fold(path, kind, consumers, routers, C, bias=bias)]

    def from_linear(self, alive: list[str], members: list[str], quantizable: set[str]) -> list[Fold]:
        """One candidate per member of a family (the experts of a layer are tried together: they run side by side)."""
        N = len(self.sites[alive[0]].view(self.block))
        device = self.ordinary.outputs[0]
        rows_C: Tensor | None = None
        try:
            found = self.readers(self.ordinary, distinct_scales(N, self.generator, device), None, dict.fromkeys(alive))
        except _Leak as leak:
            found, rows_C = self.partial(alive, N, leak)
        pairs: dict[str, dict[str, Tensor]] = {}
        for reader, columns_K in found.items():
            pairs.setdefault(self.partner(reader, alive), {})[reader] = columns_K
        first = next(iter(found.values()))
        if any(not torch.equal(columns_K, first) for columns_K in found.values()):
            raise _Leak(next(iter(found)), "its readers take the channels in different orders")
        if any(reader not in quantizable for reader in found):
            raise _Leak(next(iter(found)), "a router reads it")
        C = N if rows_C is None else len(rows_C)
        identity = torch.equal(first, torch.arange(C, device=first.device))
        model = pairs[alive[0]] if alive[0] in pairs else next(iter(pairs.values()))
        origin = alive[0] if alive[0] in pairs else next(iter(pairs))
        candidates = []
        for name in members:
            consumers = tuple(pairs.get(name, {})) or tuple(transplant(reader, origin, name) for reader in model)
            if not all(reader in self.sites for reader in consumers):
                raise _Leak(consumers[0], "a sibling of the proved readers is missing")
            bias = self.sites[name].bias
            columns = None if identity else first
            candidates.append(Fold(name, "linear", consumers, (), C, rows=rows_C, columns=columns, bias=bias))
        return candidates

    def partial(self, alive: list[str], N: int, leak: _Leak) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of a fused producer (q, k and v in one matrix; gate and up in one) that fold although all together do not."""
        like = self.ordinary.outputs[0]
        choices: list[Tensor] = []
        if leak.seen and N > leak.seen:
            try:
                scale_N = distinct_scales(N, self.generator, like)
                rows_N = torch.cat(list(self.readers(self.alike, scale_N, None, dict.fromkeys(alive)).values())).unique()
                choices.append(rows_N)
            except _Leak:
                pass
        if N == 2 * leak.seen:
            rows_N = torch.arange(N, device=like.device)
            choices += [rows_N[N // 2 :], rows_N[: N // 2], rows_N[1::2], rows_N[::2]]
        for rows_C in choices:
            scale_C = distinct_scales(len(rows_C), self.generator, like)
            try:
                return self.readers(self.ordinary, scale_C, (N, rows_C), dict.fromkeys(alive)), rows_C
            except _Leak:
                continue
        raise leak

    def partner(self, reader: str, alive: list[str]) -> str:
        """Which member of a family of producers feeds this reader: the one with the same indices in its name."""
        if len(alive) == 1:
            return alive[0]
        numbers = re.findall(r"\.(\d+)(?=\.|$)", reader)
        match = [name for name in alive if re.findall(r"\.(\d+)(?=\.|$)", name) == numbers]
        if len(match) != 1:
            raise _Leak(reader, "cannot tell which of several alike producers it reads")
        return match[0]

    def readers(
        self, reference: Reference, scale_C: Tensor, part: tuple[int, Tensor] | None, producers: Mapping[str, None]
    ) -> dict[str, Tensor]:
        """Reader -> the scale each of its columns shows, [K]; _Leak where the scales of `producers` cannot be undone."""
        factor_N = scale_C
        if part is not None:
            N, rows_C = part
            factor_N = scale_C.new_ones(N).index_put_((rows_C,), scale_C)
        expected = iter(reference.products)
        found: dict[str, Tensor] = {}
        # where one module is just this matrix and a bias, its output is scaled as a whole, wherever the bias is added
        modules = {name: self.norms.get(name) or self.alone(name) for name in producers}

        def scale_output(module: nn.Module, inputs: tuple, output: Any) -> Any:
            return output * factor_N if isinstance(output, Tensor) else output

        def on_product(weight: Weight, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            name, original = next(expected, (None, x))
            if name != self.name_of(weight) or original.numel() != x.numel():
                raise _Leak(self.name_of(weight), "the block takes another path when the channels are scaled")
            columns_K = which_scale(x.reshape(original.shape), original, scale_C)
            if columns_K is None:
                raise _Leak(name, "its input changes, but not by one factor per channel", x.shape[-1])
            if len(columns_K):
                if not torch.equal(found.setdefault(name, columns_K), columns_K):
                    raise _Leak(name, "reads the channels in two orders")
            result = run(original.reshape(x.shape))
            return result * factor_N if name in producers and modules[name] is None else result

        handles = [module.register_forward_hook(scale_output) for module in modules.values() if module is not None]
        try:
            with Float64(), Products(self.block, on_product):
                outputs = floating(self.block(*reference.args, **reference.kwargs))
        finally:
            for handle in handles:
                handle.remove()
        change = relative_change(outputs, reference.outputs)
        if change > PROOF:
            how = "something that is no linear reads it as well" if found else "it goes there without meeting a linear"
            raise _Leak("block output", f"{how} (the output changes by {change:.1e})")
        if not found:
            raise _Leak("nothing", "no linear reads it")
        return found

    def alone(self, name: str) -> nn.Module | None:
        site = self.sites[name]
        module = self.block.get_submodule(site.param.rpartition(".")[0])
        own = dict(module.named_parameters())
        return module if site.index is None and own.keys() <= {"weight", "bias"} else None


def family(name: str) -> str:
    """Names that differ in an index only (the experts of a layer) are one family."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def transplant(reader: str, origin: str, name: str) -> str:
    """The reader's name with the indices of `origin` replaced by those of `name`."""
    numbers = iter(re.findall(r"\.(\d+)(?=\.|$)", name))
    assert family(origin) == family(name)
    return re.sub(r"\.\d+(?=\.|$)", lambda match: f".{next(numbers, match.group()[1:])}", reader)


def distinct_scales(count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Scales from 1/e to e, float64 [count], evenly spaced in the logarithm and shuffled: no two are close."""
    steps = (torch.randperm(count, generator=generator).double() + 0.5) / count
    return (2 * steps - 1).exp().to(like.device)


def which_scale(x_MK: Tensor, original_MK: Tensor, scale_C: Tensor) -> Tensor | None:
    """int64 [K] with x = original * scale[result], [] where x is the original, None where it is neither.

    A column that is zero on all tokens fits any scale: it takes its own index if the counts agree.
    """
    K, C = original_MK.shape[1], len(scale_C)
    if not len(original_MK):
        return scale_C.new_empty(0, dtype=torch.long)
    top_K, token_K = original_MK.abs().max(0)
    bound_K = MATCH * top_K
    if bool(((x_MK - original_MK).abs().amax(0) <= bound_K).all()):
        return scale_C.new_empty(0, dtype=torch.long)
    column_K = torch.arange(K, device=x_MK.device)
    ratio_K = x_MK[token_K, column_K] / original_MK[token_K, column_K]
    sorted_C, order_C = scale_C.sort()
    upper_K = torch.searchsorted(sorted_C, ratio_K.nan_to_num(1.0)).clamp(1, max(C - 1, 1))
    upper_K = upper_K.clamp(max=C - 1)
    lower_K = (upper_K - 1).clamp(min=0)
    nearer = (ratio_K - sorted_C[lower_K]).abs() < (ratio_K - sorted_C[upper_K]).abs()
    chosen_K = order_C[torch.where(nearer, lower_K, upper_K)]
    if bool((top_K == 0).any()):
        if K != C:
            return None
        chosen_K = torch.where(top_K == 0, column_K, chosen_K)
    fits = (x_MK - original_MK * scale_C[chosen_K]).abs().amax(0) <= bound_K * scale_C[chosen_K]
    return chosen_K if bool(fits.all()) else None


def norm_kind(module: nn.Module, inputs: tuple, output: Tensor, scale_C: Tensor) -> str:
    """ "norm" if the weight multiplies the output, "norm+1" if 1 + weight does; _Leak if neither."""
    weight_C = module.get_parameter("weight").double()
    for kind, scaled_C in (("norm", weight_C * scale_C), ("norm+1", (weight_C + 1) * scale_C - 1)):
        with wide_parameters(module, {"weight", "bias"}), Float64():
            module.get_parameter("weight").data.copy_(scaled_C)
            if getattr(module, "bias", None) is not None:
                module.get_parameter("bias").data.mul_(scale_C)
            scaled = module(*inputs)
        if relative_change([scaled], [output * scale_C]) < PROOF:
            return kind
    raise _Leak("nothing", "its output is not proportional to its weight, nor to 1 + weight")


def prove(
    block: nn.Module,
    sites: Mapping[str, Site],
    candidates: Sequence[Fold],
    reference: Reference,
    generator: torch.Generator,
) -> list[Fold]:
    """The candidates, applied together with random scales, with the measured error; _Leak if the output changes."""
    like = reference.outputs[0]
    scales = [(0.5 * torch.randn(f.channels, generator=generator, dtype=torch.float64)).exp() for f in candidates]
    scales = [scale_C.to(like.device) for scale_C in scales]
    touched = set()
    for fold in candidates:
        touched |= {sites[name].param for name in (*fold.consumers, *fold.routers)} | ({fold.bias} - {None})
        touched.add(sites[fold.producer].param if fold.kind == "linear" else f"{fold.producer}.weight")
    with wide_parameters(block, touched), Float64():
        for fold, scale_C in zip(candidates, scales, strict=True):
            scale_producer(block, sites, fold, scale_C)
        control = relative_change(floating(block(*reference.args, **reference.kwargs)), reference.outputs)
        for fold, scale_C in zip(candidates, scales, strict=True):
            scale_consumers(block, sites, fold, scale_C)
        error = relative_change(floating(block(*reference.args, **reference.kwargs)), reference.outputs)
    readers = ", ".join(candidates[0].consumers)
    if control < CONTROL:
        raise _Leak(readers, f"the block's output does not depend on it (changes by {control:.1e}), nothing is proved")
    if not error < PROOF:
        raise _Leak(readers, f"folding changes the block's output by {error:.1e}")
    return [replace(fold, error=error) for fold in candidates]


@contextmanager
def wide_parameters(block: nn.Module, names: set[str]) -> Iterator[None]:
    """The named parameters as float64 copies inside, the very same objects as before after it."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name in sorted(names):
            path, _, leaf = name.rpartition(".")
            module = block.get_submodule(path)
            param = module._parameters.get(leaf)
            if param is not None:
                kept.append((module, leaf, param))
                module._parameters[leaf] = nn.Parameter(param.detach().double().clone(), requires_grad=False)
        yield
    finally:
        for module, leaf, param in kept:
            module._parameters[leaf] = param


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of whatever a block returns."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_change(after: list[Tensor], before: list[Tensor]) -> float:
    """The largest change of a token's vector, relative to the vector's length; inf where shapes differ or NaN appears."""
    if [t.shape for t in after] != [t.shape for t in before]:
        return float("inf")
    changes = [(a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-300) for a, b in zip(after, before, strict=True)]
    return max(float(change.max().nan_to_num(nan=float("inf"))) for change in changes)
