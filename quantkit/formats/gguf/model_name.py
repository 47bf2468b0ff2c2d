"""general.name: by it alone llama.cpp knows a tokenizer of Phi-3, so it says Phi-3 where, and only where, it is one.

In a file whose name holds "phi-3" or "phi3" in any case, special tokens swallow the spaces and line breaks behind them,
all but three; four tokens must be there, or the file does not load (src/llama-vocab.cpp, October 2026). No key of the
file says so, whatever its architecture is.
"""

import re
from collections.abc import Collection

PHI3 = re.compile(r"(phi)-?3", re.IGNORECASE)
NEEDED = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
KEEP = NEEDED - {"</s>"}  # the spaces behind these stay


def fitting_name(name: str, texts: Collection[str], special: Collection[str], swallowing: Collection[str]) -> str:
    """The name, changed where llama.cpp would do more wrong by it than without.

    texts       of all tokens; special: of those that are looked for in a text before it is cut
    swallowing  of those behind which the model's own tokenizer drops spaces (`rstrip`)
    """
    by_name = (set(special) | {"</s>"}) - KEEP
    as_phi3 = set(texts) >= NEEDED and len(by_name ^ set(swallowing)) < len(set(swallowing))
    if as_phi3 == bool(PHI3.search(name)):
        return name
    return f"{name} (Phi-3)" if as_phi3 else PHI3.sub(r"\1_3", name)


def name_remarks(name: str, written: str) -> list[str]:
    """What to say of a name that was changed; nothing of one that was not."""
    if name == written:
        return []
    does, wants = ("keep", "drops") if PHI3.search(written) else ("drop", "keeps")
    return [
        f"general.name is {written!r}: by {name!r}, llama.cpp would {does} the spaces behind special tokens, which "
        f"this tokenizer {wants}"
    ]
