"""What becomes of a GGUF file in each engine: its header, keys, tensors, tokenizer, types, and scales that are NaN.

The rules are those of llama.cpp's loader. For the scales all of the file is read; the rest needs only a header.

architectures.py  keys and tensors of each architecture
tokenizer.py      keys of the tokenizer
types.py          types of tensors, rows they do not fit, general.file_type
engines.py        what single engines read
"""

from pathlib import Path
from typing import Literal

from quantkit.checkpoint.gguf_header import GgufFile
from quantkit.checkpoint.gguf_path import open_found
from quantkit.checkpoint.gguf_values import check_values
from quantkit.errors import UserError
from quantkit.verification.findings import Finding, Verdict, error, info
from quantkit.verification.gguf.architectures import architecture_of, check_keys, check_tensors
from quantkit.verification.gguf.engines import check_engine, hardware_of, known_to
from quantkit.verification.gguf.tokenizer import check_tokenizer
from quantkit.verification.gguf.types import check_file_type, check_rows, check_types

_DAMAGED = "the file is damaged, or was quantized wrongly: make it again"
_MADE_BY = ("quantkit.", "quantize.imatrix.")


def open_file(path: Path) -> GgufFile | Finding | None:
    """The opened file that a path means, or why its header is not believed; None where the path means none."""
    try:
        return open_found(path)
    except UserError as problem:
        message, _, hint = str(problem).partition("\nhint: ")
        return error("gguf", path.name, message.removeprefix(f"{path}: "), hint or "fetch the file again")


def judge_header(file: GgufFile) -> list[Finding]:
    """Findings that concern every reader, without the values of tensors; in the order they were looked for."""
    architecture = architecture_of(file)
    found = [] if architecture is None else check_keys(file, architecture)
    if architecture is not None:
        found += check_tensors(file, architecture)
    found += check_types(file) + check_tokenizer(file) + check_file_type(file) + check_rows(file)
    if not any(key.startswith(_MADE_BY) for key in file.metadata):
        message = "no key says how it was quantized, or on which text: neither quantkit.* nor quantize.imatrix.*"
        found.append(info("gguf-origin", "", message, "ask whoever made it"))
    return found


def judge(path: Path, file: GgufFile | Finding, engine: str, shared: list[Finding], machine: str | None) -> Verdict:
    """The verdict of one engine. shared: findings that concern every reader; machine: a kind of hardware, or None."""
    if isinstance(file, Finding):
        return Verdict(str(path), engine, 1, "refused", [file], [], {})
    found, runs = shared + check_engine(file, engine), hardware_of(engine)
    if machine is not None and any(how == "no" for kind, how in runs.items() if machine.startswith(kind)):
        found.append(error("hardware", "", f"{engine} runs GGUF files on no {machine}", "load it with llama.cpp"))
    refused = any(finding.level == "error" for finding in found)
    verdict: Literal["loads", "refused", "unknown"] = (
        "refused" if refused else "loads" if known_to(file, engine) else "unknown"
    )
    order = ("error", "warning", "info")
    found = sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.level))
    return Verdict(str(path), engine, 1, verdict, found, [], {} if refused else runs)


def judge_llama(engine: str) -> tuple[list[Finding], dict[str, str]]:
    """What an engine says of a plain Llama in one GGUF file, and what each machine does with that."""
    file = GgufFile(Path("model.gguf"), 3, 32, {"general.architecture": "llama"}, {}, {})
    return check_engine(file, engine), hardware_of(engine)


def read_shared(file: GgufFile) -> list[Finding]:
    """Findings that concern every reader, the values of tensors included."""
    return judge_header(file) + [
        error("gguf-nan", bad.tensor, f"{bad.what} in {bad.count} of {bad.blocks}: results will be NaN", _DAMAGED)
        for bad in check_values(file)
    ]
