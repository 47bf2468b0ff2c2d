"""Whether sequences start with the tokenizer's BOS token."""

from typing import Any, Literal

from quantkit.errors import UserError


def starts_with_bos(tokenizer: Any, bos: bool | Literal["auto"] = "auto") -> int | None:
    """The id of the BOS token that sequences start with; None where they start with none.

    auto: where the tokenizer itself puts its bos_token before a text when special tokens are added, as it was trained
    (Llama and Gemma do, Qwen does not). true, false: always, never. UserError for true with a tokenizer without one.
    """
    found = getattr(tokenizer, "bos_token_id", None)
    if bos is False or (bos == "auto" and found is None):
        return None
    if found is None:
        raise UserError(
            "calibration.bos: true, but the model's tokenizer has no BOS token\n"
            "hint: set calibration.bos to auto or false"
        )
    if bos is True:
        return found
    ids = tokenizer("a", add_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    return found if len(ids) and ids[0] == found else None
