"""Print the lower bounds of a pyproject.toml as pip constraints: `python tests/tools/oldest.py pyproject.toml`."""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

# A name, perhaps its extras, then a lower bound; an upper bound or a marker may follow, which a pin does not need.
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(\[[^]]*\])?\s*>=\s*(?P<version>\d[\w.]*)\s*([,;].*)?")


def lower_bounds(pyproject: str) -> dict[str, str]:
    """{package: lowest version} for the dependencies and all extras in the text of a pyproject.toml, in its order.

    Raises ValueError for a requirement that is not `name>=version`, and for two bounds of one package which differ.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project.get("optional-dependencies", {}).values()
    bounds: dict[str, str] = {}
    for requirement in chain(project.get("dependencies", []), *extras):
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r}: expected a lower bound, `name>=version`")
        name, version = match["name"], match["version"]
        if bounds.setdefault(name, version) != version:
            raise ValueError(f"{requirement!r}: another lower bound of {name} is {bounds[name]}; use the same one")
    return bounds


if __name__ == "__main__":
    for name, version in lower_bounds(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        print(f"{name}=={version}")
