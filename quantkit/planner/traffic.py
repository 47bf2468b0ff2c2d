"""What a model is to be served with: lengths, sequences, devices. Checked without torch."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.header import read_json
from quantkit.errors import UserError
from quantkit.suggestions import unknown

PROFILES = ("interactive", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What is to be served; None: a default that the model allows.

    context      tokens that room is kept for, of each sequence
    concurrency  sequences at once; prompt, output: tokens of a request and of its answer
    tp, pp       devices that each layer is split over, and stages of layers
    profile      interactive or batch: what counts; price: of a device for an hour
    """

    context: int | None = None
    concurrency: int = 1
    prompt: int | None = None
    output: int | None = None
    tp: int = 1
    pp: int = 1
    profile: str | None = None
    price: float | None = None


def check_traffic(traffic: Traffic) -> None:
    """UserError for what no model could be asked for; needs no torch."""
    counts = {
        "--context": traffic.context,
        "--concurrency": traffic.concurrency,
        "--prompt": traffic.prompt,
        "--output": traffic.output,
        "--tp": traffic.tp,
        "--pp": traffic.pp,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}\nhint: give a whole number of at least 1")
    if traffic.price is not None and not 0 < traffic.price < math.inf:
        raise UserError(f"--price is {traffic.price:g}\nhint: give what one device costs an hour, above 0")
    if traffic.profile is not None and traffic.profile not in PROFILES:
        raise unknown("profile", traffic.profile, PROFILES)


@contextmanager
def config_folder(model: str) -> Iterator[str]:
    """The model as `plan` takes it: a JSON file, whatever its name, becomes a folder that holds it as config.json."""
    file = Path(model).expanduser()
    if file.suffix.lower() != ".json" or not file.is_file():
        yield model
        return
    read_json(file, "give the config.json of a model")
    with tempfile.TemporaryDirectory(prefix="quantkit-plan-") as folder:
        (Path(folder) / "config.json").write_bytes(file.read_bytes())
        try:
            yield folder
        except UserError as error:  # the reader knows the file, not the folder
            raise UserError(str(error).replace(folder, str(file))) from error
