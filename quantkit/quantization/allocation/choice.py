"""Which candidate each unit gets: the least sum of harms whose size fits, exactly; and sizes that cannot be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.checkpoint.header import build_header
from quantkit.errors import UserError
from quantkit.quantization.allocation.harms import Harms
from quantkit.quantization.allocation.units import Option, Tensors, Unit, entry_bytes
from quantkit.quantization.knapsack import allocate
from quantkit.sizes import SizeLimit

PADDING = 8  # a header's length is a multiple of it


@dataclass(frozen=True, slots=True)
class Budget:
    """What the units may take together, in the unit of the limit: bits of weights, or bytes of the files.

    cost     of an option; room: what all may cost; weights: how many there are in all units
    rest     bytes of the files that no option changes
    """

    limit: SizeLimit
    room: int
    weights: int
    rest: int

    def cost(self, option: Option) -> int:
        return option.bits if self.limit.nbytes is None else option.nbytes

    def text(self, cost: int) -> str:
        """A sum of costs as the limit was given."""
        if self.limit.nbytes is None:
            return f"{math.ceil(1000 * cost / self.weights) / 1000:g}bpw"
        return f"{cost + self.rest:,} bytes"


def budget_for(limit: SizeLimit, units: Sequence[Unit], tensors: Tensors, shard_bytes: int) -> Budget:
    """The budget of a model; UserError where no choice is that small, and where the model as it is fits already.

    tensors: of the source; shard_bytes: tensor bytes that a file of the output holds at most
    """
    weights = sum(unit.weights for unit in units)
    dense = [unit.options[-1] for unit in units]
    total = sum(info.nbytes for info in tensors.values())
    inside = {f"{name}.weight" for unit in units for name in unit.members}
    outside = {name: info for name, info in tensors.items() if name not in inside}
    files = 1 + 2 * total // shard_bytes  # two files in a row hold more than one may
    rest = files * (len(build_header([])[0]) + PADDING)
    rest += sum(info.nbytes + entry_bytes(name, info.tag, info.shape, total) for name, info in outside.items())
    room = int((limit.bits_per_weight or 0) * weights) if limit.nbytes is None else limit.nbytes - rest
    budget = Budget(limit, room, weights, rest)
    least = sum(min(map(budget.cost, unit.options)) for unit in units)
    most = sum(map(budget.cost, dense))
    if least > room:
        raise UserError(
            f"--max-size {limit.text}: no candidates make this model so small; the smallest is {budget.text(least)}\n"
            f"hint: ask for {budget.text(least)} or more, or name smaller candidates with --candidates"
        )
    if most <= room:
        raise UserError(
            f"--max-size {limit.text}: the model has {budget.text(most)} as it is stored, so nothing is to quantize\n"
            f"hint: ask for less than {budget.text(most)}"
        )
    return budget


def choose(units: Sequence[Unit], harms: Harms, budget: Budget) -> dict[str, Option]:
    """The option of each unit with the least sum of harms that fits; an exact optimum."""
    costs = [[(budget.cost(option), harms[unit.name][option.candidate]) for option in unit.options] for unit in units]
    picks = allocate(costs, budget.room)
    return {unit.name: unit.options[pick] for unit, pick in zip(units, picks, strict=True)}
