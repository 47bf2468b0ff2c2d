"""Print what `make demo` found as one table: the original beside the quantized model.

    python examples/demo.py ORIGINAL.json QUANTIZED.json QUANTIZED_FOLDER

The JSON files are those of `quantkit eval --json`; the folder holds the run's quantkit-report.json.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quantkit.inspection import (
    inspect_folder,
)
from quantkit.report.console import (
    size_text,
)


def percent(interval: dict) -> str:
    return f"{100 * interval['value']:.2f} %"


def rows(original: dict, quantized: dict, folder: Path) -> list[tuple[str, str, str]]:
    """(what, original, quantized) for each line of the table."""
    report = json.loads((folder / "quantkit-report.json").read_text(encoding="utf-8"))
    before, after = inspect_folder(original["model"]), inspect_folder(folder)
    plain, found = original["texts"][0], quantized["texts"][0]
    return [
        ("size", size_text(before["bytes"]), size_text(after["bytes"])),
        ("bits per weight, quantized linears", "16.000", f"{after['bits_per_weight']['quantized']:.3f}"),
        ("bits per weight, whole model", *(f"{x['bits_per_weight']['model']:.3f}" for x in (before, after))),
        ("perplexity", *(f"{x['perplexity']['value']:.3f}" for x in (plain, found))),
        ("KL(original || quantized), nats", "0", f"{found['kl']['mean']['value']:.5f}"),
        ("top-1 agreement", "100 %", percent(found["top1_agreement"])),
        ("seconds to quantize", "", f"{report['seconds_total']:.1f}"),
        ("peak memory", "", f"{report['peak_memory_bytes'] / 2**20:.0f} MiB"),
    ]


def main() -> None:
    original, quantized = (json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:3])
    folder = Path(sys.argv[3])
    table = Table("", original["model"], str(folder))
    for row in rows(original, quantized, folder):
        table.add_row(*row)
    Console().print(table)
    text = quantized["texts"][0]
    print(f"{text['tokens']} tokens of {text['text']['name']}, windows of {quantized['context']}")


if __name__ == "__main__":
    main()
