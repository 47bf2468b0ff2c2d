"""How much calibration text a recipe reads on a model."""

from quantkit.planner.model_inventory import ModelInventory
from quantkit.quantization.calibration.data import check_calibration
from quantkit.recipe.recipe import Recipe
from quantkit.report.plan import CalibrationSize


def calibration_size(recipe: Recipe, inventory: ModelInventory) -> CalibrationSize | None:
    """Samples and their length; None without calibration. UserError where the text is missing or the length too long."""
    if recipe.calibration is None:
        return None
    longest = getattr(inventory.config.get_text_config(), "max_position_embeddings", None)
    check_calibration(recipe.calibration, longest)
    return CalibrationSize(recipe.calibration.samples, recipe.calibration.seq_len)
