"""Static ranges of linears' inputs, from all calibration tokens. Linears with one input share its range."""

import re

from torch import Tensor

from quantkit.algorithms.activation_range import Histogram, choose_range
from quantkit.errors import RunError
from quantkit.grids.activations import static_range
from quantkit.quantization.targets import LinearTarget
from quantkit.types import ActivationRange


class InputRanges:
    """Histograms of the input groups whose linears have static ranges."""

    def __init__(self, members: list[tuple[int, list[LinearTarget]]]) -> None:
        self.watched = {group: linears for group, linears in members if any(map(is_static, linears))}
        self.seen: dict[int, Histogram] = {}

    def add(self, group: int, x_MK: Tensor) -> None:
        """Count one batch of a group's inputs; RunError naming the linears where it holds NaN or Inf."""
        if group in self.watched:
            try:
                self.seen.setdefault(group, Histogram()).add(x_MK)
            except RunError as error:
                raise RunError(f"{', '.join(linear.name for linear in self.watched[group])}: {error}") from error

    def range_of(self, linear: LinearTarget, group: int) -> ActivationRange:
        """The range of a linear's input; without tokens that of its sibling experts. RunError where none had any."""
        assert linear.activations is not None
        assert linear.scheme.activations is not None
        seen = self.seen.get(group)
        if seen is None:
            role = _role(linear)
            siblings = [found for other, found in self.seen.items() if role in map(_role, self.watched[other])]
            if not siblings:
                raise RunError(f"{linear.name}: no calibration token reached it, so its inputs have no static range")
            seen = Histogram()
            for found in siblings:
                seen.merge(found)
        spec, options = linear.scheme.activations, linear.activations
        return static_range(*choose_range(seen, spec, options.observer, options.percentile), spec)


def is_static(linear: LinearTarget) -> bool:
    """Whether the linear's inputs need a number from calibration."""
    return linear.scheme.activations is not None and linear.scheme.activations.calibrated


def _role(linear: LinearTarget) -> str:
    """The module's name without its numbers: the same for all experts' first (or second) linears."""
    return re.sub(r"\d+", "#", linear.name)
