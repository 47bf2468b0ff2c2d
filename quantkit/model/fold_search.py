"""Find by trial which producers of a block can hand a per-channel scale to their readers. Nothing is looked up.

Run the block in float64, multiply one producer's output by scales that all differ, and look at the input of every
later product. Equal to the original: not affected. Original times one of the scales, column by column: a reader, and
the scale a column shows says which channel it reads (grouped-query attention, which repeats v, needs no special case);
it is then given its original result, as if its columns had been divided. Anything else: no fold. All found are proved.

Shapes: M = tokens, C = channels a fold scales, K = in features of its readers, N = out features of a producer.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.model.folds import (
    PROOF,
    Fold,
    LeakError,
    Product,
    Reference,
    floating,
    prove,
    relative_change,
    wide_parameters,
)
from quantkit.model.matmul_tracing import Float64, LinearSite, TraceMatmuls, WeightKey, evaluation, widen, without_cache

MATCH = 1e-8  # of a column's largest value; wrong scales differ by 1e-5 and more, float64 sums by 1e-13


def find_folds(
    block: nn.Module,
    sites: Mapping[str, LinearSite],
    quantizable: set[str],
    args: tuple,
    kwargs: dict,
    *,
    seed: int = 0,
) -> tuple[list[Fold], list[tuple[str, str]]]:
    """All proved folds of the block and, for each other producer, ("producer -> reader", why not).

    `sites` are all matrices by name, `quantizable` those that are to be quantized (the others are routers). Costs one
    or two runs of the block on the tokens given (a few will do), one run without products per producer, per fold two
    runs with only the products it touches. All in float64: one weight at a time is widened, and the parameters of
    the fold that is being proved.
    """
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = without_cache(args, kwargs)
    folds: list[Fold] = []
    rejected: list[tuple[str, str]] = []
    small = {name for name, param in block.named_parameters() if param.dim() < 2}
    with evaluation(block), wide_parameters(block, small):
        try:
            search = Search(block, sites, args, kwargs, generator)
        except Exception as error:
            return [], [("every producer", no_search(error))]
        for name, attempt in search.attempts(quantizable):
            try:
                candidates = attempt()
                folds.extend(prove(block, sites, candidates, search.ordinary, generator))
            except LeakError as leak:
                rejected.append((f"{name} -> {leak.where}", str(leak)))
            except Exception as error:
                rejected.append((f"{name} -> nothing", no_search(error)))
    return folds, rejected


def no_search(error: Exception) -> str:
    """Why a trial in float64 found nothing: the model's own code failed in it. Out of memory is raised again."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        raise error
    first_line = next(iter(str(error).splitlines()), "")
    return f"the block fails when it is tried in float64: {type(error).__name__}: {first_line}"


class Search:
    """The runs that find candidates for one block."""

    def __init__(
        self, block: nn.Module, sites: Mapping[str, LinearSite], args: tuple, kwargs: dict, generator: torch.Generator
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
        products: list[Product] = []
        norms: dict[str, list[tuple[tuple, Tensor]]] = {path: [] for path in self.norms}

        def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            result = run(x)
            products.append(Product(self.name_of(weight), x.reshape(-1, x.shape[-1]).clone(), result.clone()))
            return result

        def keep(path: str) -> Callable:
            return lambda module, inputs, output: norms[path].append((copied(inputs), copied(output)))

        handles = [module.register_forward_hook(keep(path)) for path, module in self.norms.items()]
        try:
            with Float64(), TraceMatmuls(self.block, on_product):
                outputs = floating(self.block(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        return Reference(args, kwargs, products, outputs, norms)

    def name_of(self, weight: WeightKey) -> str:
        return self.names.get((weight.param, weight.index), weight.param)

    def attempts(self, quantizable: set[str]) -> Iterator[tuple[str, Callable[[], list[Fold]]]]:
        ran = {product.name for product in self.ordinary.products}
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
            raise LeakError("nothing", f"the norm ran {len(runs)} times on the trial tokens, not once")
        (inputs, output), module = runs[0], self.norms[path]
        C = len(module.get_parameter("weight"))
        if output.shape[-1] != C:
            raise LeakError("nothing", f"its output has {output.shape[-1]} channels, its weight {C}")
        kind = norm_kind(module, inputs, output, distinct_scales(C, self.generator, output))
        scale_C = distinct_scales(C, self.generator, output)
        found = self.readers(self.ordinary, scale_C, None, {path: None})
        bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
        ran = {product.name for product in self.ordinary.products}
        names = set(found)  # and their siblings that no trial token reached
        names |= {name for reader in found for name in self.families[family(reader)] if name not in ran}
        for reader, columns_K in found.items():
            if not torch.equal(columns_K, torch.arange(C, device=columns_K.device)):
                raise LeakError(reader, "reads the channels of a norm in another order")
        consumers = tuple(name for name in self.sites if name in names and name in quantizable)
        if not consumers:
            raise LeakError("nothing", "no quantized linear reads its output")
        routers = tuple(name for name in self.sites if name in names and name not in quantizable)
        return [Fold(path, kind, consumers, routers, C, bias=bias)]

    def from_linear(self, alive: list[str], members: list[str], quantizable: set[str]) -> list[Fold]:
        """One candidate per member of a family (the experts of a layer are tried together: they run side by side)."""
        N = len(self.sites[alive[0]].view(self.block))
        device = self.ordinary.outputs[0]
        rows_C: Tensor | None = None
        try:
            found = self.readers(self.ordinary, distinct_scales(N, self.generator, device), None, dict.fromkeys(alive))
        except LeakError as leak:
            found, rows_C = self.partial(alive, N, leak)
        pairs: dict[str, dict[str, Tensor]] = {}
        for reader, columns_K in found.items():
            pairs.setdefault(self.partner(reader, alive), {})[reader] = columns_K
        first = next(iter(found.values()))
        if any(not torch.equal(columns_K, first) for columns_K in found.values()):
            raise LeakError(next(iter(found)), "its readers take the channels in different orders")
        if any(reader not in quantizable for reader in found):
            raise LeakError(next(iter(found)), "a router reads it")
        C = N if rows_C is None else len(rows_C)
        identity = torch.equal(first, torch.arange(C, device=first.device))
        model = pairs[alive[0]] if alive[0] in pairs else next(iter(pairs.values()))
        origin = alive[0] if alive[0] in pairs else next(iter(pairs))
        candidates = []
        for name in members:
            consumers = tuple(pairs.get(name, {})) or tuple(transplant(reader, origin, name) for reader in model)
            if not all(reader in self.sites for reader in consumers):
                raise LeakError(consumers[0], "a sibling of the proved readers is missing")
            bias = self.sites[name].bias
            columns = None if identity else first
            candidates.append(Fold(name, "linear", consumers, (), C, rows=rows_C, columns=columns, bias=bias))
        return candidates

    def partial(self, alive: list[str], N: int, leak: LeakError) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of a fused producer (q, k and v in one matrix; gate and up) that fold although all together do not."""
        like = self.ordinary.outputs[0]
        choices: list[Tensor] = []
        if 0 < leak.seen < N:
            try:
                scale_N = distinct_scales(N, self.generator, like)
                rows_N = torch.cat(
                    list(self.readers(self.alike, scale_N, None, dict.fromkeys(alive)).values())
                ).unique()
                choices.append(rows_N)
            except LeakError:
                pass
        if leak.seen * 2 == N:
            rows_N = torch.arange(N, device=like.device)
            choices += [rows_N[N // 2 :], rows_N[: N // 2], rows_N[1::2], rows_N[::2]]
        for rows_C in choices:
            scale_C = distinct_scales(len(rows_C), self.generator, like)
            try:
                return self.readers(self.ordinary, scale_C, (N, rows_C), dict.fromkeys(alive)), rows_C
            except LeakError:
                continue
        raise leak

    def partner(self, reader: str, alive: list[str]) -> str:
        """Which member of a family of producers feeds this reader: the one with the same indices in its name."""
        if len(alive) == 1:
            return alive[0]
        numbers = re.findall(r"\.(\d+)(?=\.|$)", reader)
        match = [name for name in alive if re.findall(r"\.(\d+)(?=\.|$)", name) == numbers]
        if len(match) != 1:
            raise LeakError(reader, "cannot tell which of several alike producers it reads")
        return match[0]

    def readers(
        self, reference: Reference, scale_C: Tensor, part: tuple[int, Tensor] | None, producers: Mapping[str, None]
    ) -> dict[str, Tensor]:
        """Reader -> the scale each of its columns shows, [K]; LeakError where the readers cannot undo the scales."""
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

        def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            known, name = next(expected, None), self.name_of(weight)
            if known is None or known.name != name or known.x_MK.numel() != x.numel():
                raise LeakError(name, "the block takes another path when the channels are scaled")
            original = known.x_MK
            columns_K = which_scale(x.reshape(original.shape), original, scale_C)
            if columns_K is None:
                raise LeakError(name, "its input changes, but not by one factor per channel", x.shape[-1])
            if len(columns_K) and not torch.equal(found.setdefault(name, columns_K), columns_K):
                raise LeakError(name, "reads the channels in two orders")
            # fed its original input a product gives its original result: nothing to compute
            return known.result * (factor_N if name in producers and modules[name] is None else 1)

        handles = [module.register_forward_hook(scale_output) for module in modules.values() if module is not None]
        try:
            with Float64(), TraceMatmuls(self.block, on_product):
                outputs = floating(self.block(*reference.args, **reference.kwargs))
        finally:
            for handle in handles:
                handle.remove()
        change = relative_change(outputs, reference.outputs)
        if change > PROOF:
            how = (
                "something other than a linear reads it as well" if found else "it goes there without meeting a linear"
            )
            raise LeakError("block output", f"{how} (the output changes by {change:.1e})")
        if not found:
            raise LeakError("nothing", "no linear reads it")
        return found

    def alone(self, name: str) -> nn.Module | None:
        site = self.sites[name]
        module = self.block.get_submodule(site.param.rpartition(".")[0])
        own = dict(module.named_parameters())
        return module if site.index is None and own.keys() <= {"weight", "bias"} else None


def copied(value: Any) -> Any:
    """The same with its tensors cloned: models write into tensors they were given."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


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
    """ "norm" if the weight multiplies the output, "norm+1" if 1 + weight does; LeakError if neither."""
    weight_C = module.get_parameter("weight").double()
    for kind, scaled_C in (("norm", weight_C * scale_C), ("norm+1", (weight_C + 1) * scale_C - 1)):
        with wide_parameters(module, {"weight", "bias"}), Float64():
            module.get_parameter("weight").data.copy_(scaled_C)
            if getattr(module, "bias", None) is not None:
                module.get_parameter("bias").data.mul_(scale_C)
            scaled = module(*inputs)
        if relative_change([scaled], [output * scale_C]) < PROOF:
            return kind
    raise LeakError("nothing", "its output is not proportional to its weight, nor to 1 + weight")
