"""What a run leaves of harms that were measured alone: linears behind a unit are re-fitted and undo a part of them.

How much depends on where a unit stands: of the first output projection of a small model a quarter is left, of the last
down projection all. So the units of a kind in a part of the depth are quantized together, everything else in 8 bits
(which is re-fitted, and hardly does harm of its own), and the KL of that run is compared with the sum of their harms.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.journal import Journal
from quantkit.quantization import pipeline
from quantkit.quantization.allocation.harms import Harms
from quantkit.quantization.allocation.recipe_text import recipe_of, recipe_text
from quantkit.quantization.allocation.units import Option, Unit
from quantkit.recipe.candidates import GPTQ, Candidate
from quantkit.recipe.recipe import Recipe

PARTS = 4  # of the depth, at most
REST = Candidate(
    "8 bits",
    {"weights": {"type": "int", "bits": 8, "symmetric": True, "group_size": "channel", "algorithm": {"gptq": {}}}},
)
FLOOR = 4  # times the KL of 8 bits alone: of smaller harms no share can be told
SHARES = (0.1, 1.5)  # what a share may be

Shares = dict[str, float]  # unit -> of its harms


class ContextRuns:
    """Whole runs of a model in which some units are quantized as chosen, and all others to 8 bits.

    journal  of the harms: runs that were done before are read from it; their files lie in its folder meanwhile
    """

    def __init__(
        self,
        base: Recipe,
        candidates: Sequence[Candidate],
        units: Sequence[Unit],
        journal: Journal,
        run: Mapping[str, Any],
    ) -> None:
        """run: how `pipeline.quantize` is called: device, trust_remote_code."""
        output = base.output.model_copy(update={"engine": None, "tp": 1})
        self.base, self.units, self.journal, self.run = base.model_copy(update={"output": output}), units, journal, run
        self.candidates = [*candidates, REST]
        self._known = {entry["recipe"]: entry["kl"] for entry in journal.entries if "recipe" in entry}

    def divergence(self, chosen: Mapping[str, Option]) -> float:
        """KL on the held-out windows; units that are not in `chosen` have 8 bits."""
        rest = Option(REST.name, (), 0, 0)
        others = {u.name: rest if any(o.targets for o in u.options) else u.options[-1] for u in self.units}
        whole = {**others, **chosen}
        text = recipe_text(self.base, self.candidates, self.units, whole, [])
        if text not in self._known:
            place = self.journal.folder / "context"
            shutil.rmtree(place, ignore_errors=True)
            report = pipeline.quantize(recipe_of(text), place, restart=True, progress=False, **self.run)
            shutil.rmtree(place)
            assert report.held_out is not None, "harms were measured on the same windows"
            self._known[text] = report.held_out.kl
            self.journal.append({"recipe": text, "kl": report.held_out.kl})
        return self._known[text]


def shares_left(runs: ContextRuns, harms: Harms, chosen: Mapping[str, Option], note: Callable[[str], None]) -> Shares:
    """The share of each unit's harms that a run leaves, measured with the options of a first choice.

    1 where nothing is re-fitted, and where the harm is so small that it cannot be told from that of 8 bits.
    """
    if not any(one.keys["weights"]["algorithm"] == GPTQ for one in runs.candidates[:-1]):
        return {unit.name: 1.0 for unit in runs.units}
    floor, shares = runs.divergence({}), Shares()
    for label, members in _cells(runs.units):
        note(label)
        alone = sum(harms[unit.name][chosen[unit.name].candidate] for unit in members)
        share = 1.0
        if alone > FLOOR * floor:
            found = runs.divergence({unit.name: chosen[unit.name] for unit in members})
            share = min(max((found - floor) / alone, SHARES[0]), SHARES[1])
        shares |= {unit.name: share for unit in members}
    return shares


def scaled(harms: Harms, shares: Shares) -> Harms:
    """The harms as a run leaves them."""
    return {unit: {name: shares[unit] * harm for name, harm in found.items()} for unit, found in harms.items()}


def _cells(units: Sequence[Unit]) -> Iterator[tuple[str, list[Unit]]]:
    """Units that share a figure, with what they are: those of a kind in one part of the depth."""
    blocks = 1 + max(unit.block for unit in units)
    parts = min(PARTS, blocks)
    cells: dict[tuple[str, int], list[Unit]] = {}
    for unit in units:
        kind = re.sub(r"\d+", "#", unit.name).rpartition("#.")[2]
        cells.setdefault((kind, unit.block * parts // blocks), []).append(unit)
    for (kind, part), members in cells.items():
        yield f"{kind}, part {part + 1} of {parts}", members
