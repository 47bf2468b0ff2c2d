"""What a user chooses about a GGUF file, and what is wrong with it: answered before torch is imported."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.checkpoint.output_folder import check_output
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import mix_name, type_name
from quantkit.sizes import bytes_in
from quantkit.types import Scheme

SUFFIX = ".gguf"
NEAREST = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}  # mix by bits of a code


@dataclass(frozen=True, slots=True)
class Choices:
    """What may be chosen; names in any case.

    requantize       a mix, or F32, F16 or BF16; "auto": the mix of about as many bits as the folder has; None: codes,
                     scales and dense tensors stay as they are
    token_embedding, output_type  types of the embedding table and of the head; None: as stored, or as the mix has it
    pre              llama.cpp's name of the pre-tokenizer; None: found by what the tokenizer does
    max_shard        text like 4G: the bytes of a file, beyond which it becomes several; None: one file
    """

    requantize: str | None = None
    token_embedding: str | None = None
    output_type: str | None = None
    pre: str | None = None
    max_shard: str | None = None

    def checked(self) -> "Choices":
        """The same with names in capitals; UserError for a name that GGUF, or quantkit, does not have."""
        mix = self.requantize
        found = replace(
            self,
            requantize=mix if mix in (None, "auto") else mix_name(mix),
            token_embedding=_type(self.token_embedding, "--token-embedding"),
            output_type=_type(self.output_type, "--output-type"),
        )
        assert found.shard_bytes
        return found

    def refuse(self) -> None:
        """UserError for what has a meaning for GGUF files alone."""
        if self.requantize not in (None, "auto"):
            raise UserError(
                f"--requantize {self.requantize}: only a GGUF file has mixes\nhint: pass --requantize alone"
            )
        for option in ("token_embedding", "output_type", "pre", "max_shard"):
            if getattr(self, option) is not None:
                name = option.replace("_", "-")
                raise UserError(f"--{name} is for GGUF files\nhint: leave it out, or name the output NAME.gguf")

    @property
    def shard_bytes(self) -> int:
        """Bytes of a file; UserError where max_shard is no size."""
        if self.max_shard is None:
            return 1 << 62
        if (size := bytes_in(self.max_shard)) is None:
            raise UserError(f"--max-shard {self.max_shard!r} is not a size\nhint: write 4G, 500M, ...")
        return size

    def mix_for(self, schemes: Iterable[Scheme]) -> str | None:
        """The mix by name; UserError where it is to follow from a folder that is not quantized."""
        if self.requantize != "auto":
            return self.requantize
        bits = Counter(scheme.weights.bits for scheme in schemes)
        if not bits:
            raise UserError(
                "--requantize: the folder is not quantized, so no mix follows from it\nhint: name one: q4_k_m"
            )
        return NEAREST[bits.most_common(1)[0][0]]


def is_gguf(output: Path, format_name: str | None) -> bool:
    """Whether a GGUF file is meant, by the format or else by the name; UserError where the two disagree."""
    if format_name is None and output.suffix.lower() != SUFFIX:
        raise UserError(
            f"no format for {output}\nhint: pass --format compressed-tensors (or another), or name the output NAME.gguf"
        )
    if format_name not in (None, "gguf") and output.suffix.lower() == SUFFIX:
        raise UserError(f"{output} is the name of a GGUF file, the format is {format_name}\nhint: leave --format out")
    return format_name in (None, "gguf")


def check_gguf_conversion(source: Path, output: Path) -> Checkpoint:
    """The opened folder `source`; UserError where it is no model, and for a name that does not end in .gguf, a file
    (or a set of shards) that exists, and a place where none can be made."""
    if output.suffix != SUFFIX:
        raise UserError(f"{output}: the name of a GGUF file ends in .gguf\nhint: name it {output.name or 'model'}.gguf")
    check_output(output)
    checkpoint = Checkpoint.open(source)
    check_output(output, checkpoint.folder)
    shard = re.compile(re.escape(output.stem) + r"-\d{5}-of-\d{5}\.gguf")
    for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else ():
        if shard.fullmatch(path.name):
            raise UserError(f"{path} exists and is never overwritten\nhint: choose another name, or move it away")
    return checkpoint


def _type(name: str | None, option: str) -> str | None:
    return None if name is None else type_name(name, option)
