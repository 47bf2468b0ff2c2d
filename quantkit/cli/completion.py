"""What the shell completes options with; imported by a completion alone."""

from collections.abc import Callable, Iterable
from typing import get_args


def _recipes() -> Iterable[str]:
    from quantkit.recipe.names import shipped

    return shipped()


def _schemes() -> Iterable[str]:
    from quantkit.recipe.number_formats import PRESETS

    return PRESETS


def _engines() -> Iterable[str]:
    from quantkit.verification.subject import ENGINES

    return ENGINES


def _formats() -> Iterable[str]:
    from quantkit.recipe.sections import Output

    return get_args(Output.model_fields["format"].annotation)


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "recipes": _recipes,
    "schemes": _schemes,
    "engines": _engines,
    "formats": _formats,
}
