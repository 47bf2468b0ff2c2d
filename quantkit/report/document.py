"""A whole report as one object: what the run did, what was measured, the verdict; and JSON of a versioned schema."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.report.measurements import Measurements
from quantkit.report.records import REPORT, Report
from quantkit.report.verdict import ReportVerdict

SCHEMA = "quantkit.report/1"  # the number grows when a reader of the old one would misread the new one
DOCUMENT = "quantkit-evaluation.json"


@dataclass(frozen=True, slots=True)
class Document:
    """A report. folder: where the checkpoint lies, as it was named."""

    folder: str
    report: Report
    measured: Measurements
    verdict: ReportVerdict

    @property
    def command(self) -> str | None:
        """What makes the checkpoint again; None where the model was a module in memory."""
        folder = Path(self.folder)
        words = ["quantkit", "quantize", "--recipe", str(folder / REPORT), "--output", f"{folder}-again"]
        return None if self.report.model is None else shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `document_schema` describes; `run` is the content of quantkit-report.json."""
        return {
            "schema": SCHEMA,
            "folder": self.folder,
            "verdict": TypeAdapter(ReportVerdict).dump_python(self.verdict, mode="json"),
            "measured": TypeAdapter(Measurements).dump_python(self.measured, mode="json"),
            "command": self.command,
            "run": self.report.to_json(),
        }


def measurements_of(content: Any) -> Measurements | None:
    """What an earlier report measured; None where that is another schema's, or damaged."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    try:
        return TypeAdapter(Measurements).validate_python(content.get("measured"))
    except ValidationError:
        return None


def document_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `Document.to_json`."""
    parts = {"verdict": ReportVerdict, "measured": Measurements}
    schemas = {name: TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}") for name, kind in parts.items()}
    shared = {name: one for schema in schemas.values() for name, one in schema.pop("$defs", {}).items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "folder": {"type": "string"},
            **schemas,
            "command": {"type": ["string", "null"]},
            "run": {"type": "object", "description": f"the content of {REPORT}"},
        },
        "required": ["schema", "folder", *parts, "command", "run"],
        "$defs": shared,
    }
