"""Static ranges of linears' inputs, from everything calibration shows of them. All linears with one input share it."""

from torch import Tensor

from quantkit.algorithms.observers import Histogram, choose_range
from quantkit.errors import RunError
from quantkit.grids.activations import static_range
from quantkit.plan import Linear
from quantkit.types import InputRange


class InputRanges:
    """Histograms of the input groups whose linears have static ranges."""

    def __init__(self, members: list[tuple[int, list[Linear]]]) -> None:
        self.watched = {group for group, linears in members if any(map(is_static, linears))}
        self.seen: dict[int, Histogram] = {}

    def add(self, group: int, x_MK: Tensor) -> None:
        """Count one batch of a group's inputs."""
        if group in self.watched:
            self.seen.setdefault(group, Histogram()).add(x_MK)

    def range_of(self, linear: Linear, group: int) -> InputRange:
        """An expert without tokens gets the range of all its siblings together; RunError where none had any."""
        assert linear.activations is not None
        assert linear.scheme.activations is not None
        seen = self.seen.get(group)
        if seen is None:
            if not self.seen:
                raise RunError(f"{linear.name}: no calibration token reached it, so its inputs have no static range")
            seen = Histogram()
            for other in self.seen.values():
                seen.merge(other)
        spec, options = linear.scheme.activations, linear.activations
        return static_range(*choose_range(seen, spec, options.observer, options.percentile), spec)


def is_static(linear: Linear) -> bool:
    """Whether a number about the linear's inputs comes from calibration."""
    return linear.scheme.activations is not None and linear.scheme.activations.calibrated
