"""How much calibration text a recipe reads on a model."""

from quantkit.planner.model_inventory import ModelInventory
from quantkit.quantization.calibration.amount import amount
from quantkit.quantization.calibration.sources import check_sources
from quantkit.recipe.recipe import Recipe
from quantkit.report.plan import CalibrationSize


def calibration_size(recipe: Recipe, inventory: ModelInventory) -> CalibrationSize | None:
    """Samples and their length, None without calibration; UserError where a text is missing or the length too long.

    What the recipe leaves to auto is what a run takes of data that has as much.
    """
    if recipe.calibration is None:
        return None
    check_sources(recipe.calibration)
    widths = [m.shape[1] for m in inventory.matrices if recipe.weights_for(m.name, m.class_name) is not None]
    longest = getattr(inventory.config.get_text_config(), "max_position_embeddings", None)
    found = amount(recipe.calibration, widest=max(widths, default=0), max_positions=longest)
    return CalibrationSize(found.samples, found.seq_len)
