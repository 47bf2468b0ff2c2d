"""How much calibration text a recipe reads on a model."""

from pathlib import Path

from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.planner.model_inventory import ModelInventory
from quantkit.quantization.calibration.amount import Amount, amount
from quantkit.quantization.calibration.data import token_batches
from quantkit.quantization.calibration.sources import Place, check_sources, place_rows
from quantkit.quantization.calibration.widest import widest_input
from quantkit.recipe.data_sets import GENERAL
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.sections import Calibration
from quantkit.report.plan import CalibrationSize

PLENTY = 16  # bytes of a file for each token wanted: it is then not read to see whether it is long enough
BYTES = 3.5  # of text for a token, about


def calibration_size(recipe: Recipe, inventory: ModelInventory) -> CalibrationSize | None:
    """Samples and their length, None without calibration.

    What is left to auto is settled as a run settles it, where texts are short by an estimate of their tokens. UserError
    where a text is missing or the length too long.
    """
    if recipe.calibration is None:
        return None
    wanted = _wanted(recipe, inventory)
    have = sum(_text_bytes(place) for place in check_sources(recipe.calibration)) / BYTES
    samples = wanted.samples
    if wanted.auto_samples and have < wanted.tokens:
        samples = max(1, int(have / wanted.seq_len))
    return CalibrationSize(samples, wanted.seq_len)


def check_text(recipe: Recipe, inventory: ModelInventory, folder: Path, trust_remote_code: bool) -> None:
    """UserError for texts that a run would refuse: of files, what they are; of short ones, all that is in them.

    folder: the model's. Where it holds no tokenizer yet, and for data sets of the Hub, nothing is read.
    """
    if recipe.calibration is None or not inventory.from_headers:
        return
    wanted, places = _wanted(recipe, inventory), check_sources(recipe.calibration)
    local = [place for place in places if place.path is not None]
    for place in local:
        if not place.is_text:
            next(iter(place_rows(place)), None)
    if len(local) < len(places) or sum(map(_text_bytes, local)) > PLENTY * wanted.tokens:
        return
    text = inventory.config.get_text_config()
    token_batches(
        recipe.calibration,
        locate_tokenizer(folder, trust_remote_code),
        max_positions=getattr(text, "max_position_embeddings", None),
        widest=widest_input(inventory.model, recipe),
    )


def _wanted(recipe: Recipe, inventory: ModelInventory) -> Amount:
    assert isinstance(recipe.calibration, Calibration)
    longest = getattr(inventory.config.get_text_config(), "max_position_embeddings", None)
    return amount(recipe.calibration, widest=widest_input(inventory.model, recipe), max_positions=longest)


def _text_bytes(place: Place) -> float:
    """Bytes of a source; infinite for those that cannot be told."""
    if place.data == GENERAL:
        return sum(len(str(row.get("text") or row.get("messages"))) for _, row in place_rows(place))
    if place.path is None or place.path.is_dir():
        return float("inf")
    return place.path.stat().st_size
