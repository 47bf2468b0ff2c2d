"""The data sets that have a short name here: where each lies on the Hub. No torch, no datasets here."""

from dataclasses import dataclass, replace

from quantkit.errors import UserError
from quantkit.recipe.messages import did_you_mean


@dataclass(frozen=True, slots=True)
class DataSet:
    """A Hub data set. subset: its configuration, None for the only one; column: the one to read, None: by its names."""

    hub_id: str
    subset: str | None
    split: str
    column: str | None


GENERAL = "general"  # the set in the wheel
DATA_SETS: dict[str, DataSet] = {
    "ultrachat": DataSet("HuggingFaceH4/ultrachat_200k", None, "train_sft", "messages"),
    "wikitext": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "c4": DataSet("allenai/c4", "en", "train", "text"),
    "pile-10k": DataSet("NeelNanda/pile-10k", None, "train", "text"),
    "fineweb-edu": DataSet("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "cnn_dailymail": DataSet("abisee/cnn_dailymail", "3.0.0", "train", "article"),
}
NAMES = (GENERAL, *DATA_SETS)


def is_known(data: str) -> bool:
    """Whether `data` names `general` or a set of the table, with a subset and a split or without."""
    return data.partition(":")[0] in NAMES


def data_set(data: str) -> DataSet:
    """The Hub data set that NAME, NAME:SUBSET, NAME:SUBSET:SPLIT or NAME::SPLIT names.

    A name of the table brings its own subset, split and column. A bare name that is nearly one of the table, and a name
    with too many parts, are a UserError.
    """
    name, subset, split, *rest = [*data.split(":"), "", ""]
    if rest[2:] or not name or data.count(":") > 2:
        raise UserError(f"no data set {data!r}\nhint: write NAME, NAME:SUBSET, NAME:SUBSET:SPLIT or NAME::SPLIT")
    if "/" not in name and name not in DATA_SETS and (hint := did_you_mean(name, NAMES, cutoff=0.75)):
        raise UserError(f"no file and no data set {name!r}\nhint: {hint.removeprefix('; ')}")
    found = DATA_SETS.get(name, DataSet(name, None, "train", None))
    return replace(found, subset=subset or found.subset, split=split or found.split)
