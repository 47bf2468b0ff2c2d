"""What a quantization run leaves to be read: its report, which becomes JSON once, in quantkit-report.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.report.block_records import BlockRecord, FoldRecord, LinearRecord, RejectedFold, SkippedLinear

Json = dict[str, Any]
REPORT = "quantkit-report.json"


@dataclass(frozen=True, slots=True)
class HeldOutRecord:
    """The quantized model beside the original on windows it was not calibrated on.

    tokens  of these windows; kl: mean KL(original || quantized) of the next token in nats, computed as an engine
            computes it (inputs and caches rounded); top1_agreement: share of tokens with the same likeliest next one
    """

    tokens: int
    kl: float
    top1_agreement: float

    def to_json(self) -> Json:
        """Its place in the report."""
        return {"tokens": self.tokens, "kl": self.kl, "top1_agreement": self.top1_agreement}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "HeldOutRecord":
        """The inverse of `to_json`."""
        return HeldOutRecord(found["tokens"], found["kl"], found["top1_agreement"])


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """One data set of a calibration: its name as given, sha256 of what was read of it, rows or bytes read."""

    name: str
    sha256: str | None = None
    rows: int | None = None
    bytes: int | None = None

    def to_json(self) -> Json:
        """Its entry of the report."""
        found = {"name": self.name, "sha256": self.sha256, "rows": self.rows, "bytes": self.bytes}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """What a run was calibrated on.

    sha256   of the token ids: equal ids, equal bytes of the result
    samples  windows of seq_len tokens; bos: whether each begins with the tokenizer's BOS, None where ids were given
    """

    sha256: str
    samples: int
    seq_len: int
    bos: bool | None
    sources: tuple[CalibrationSource, ...]

    def to_json(self) -> Json:
        """Its section of the report."""
        return {
            "sha256": self.sha256,
            "samples": self.samples,
            "seq_len": self.seq_len,
            "bos": self.bos,
            "sources": [source.to_json() for source in self.sources],
        }

    @staticmethod
    def from_json(section: Mapping[str, Any]) -> "CalibrationRecord":
        """The inverse of `to_json`."""
        sources = tuple(CalibrationSource(**source) for source in section["sources"])
        return CalibrationRecord(section["sha256"], section["samples"], section["seq_len"], section["bos"], sources)


@dataclass(frozen=True, slots=True)
class GgufRecord:
    """What a GGUF file holds.

    types   type -> (tensors, bytes) of all tensors; bits_per_weight: of all of them together
    tables  the embedding and the head, where they are quantized
    measured  of a measured mix: KL in nats by rounding, of the chosen types and of llama.cpp's nearest mixes
    """

    types: dict[str, tuple[int, int]]
    bits_per_weight: float
    tables: tuple[LinearRecord, ...] = ()
    measured: Json | None = None

    def to_json(self) -> Json:
        """Its place in the report."""
        return {
            "types": {name: {"tensors": count, "bytes": size} for name, (count, size) in self.types.items()},
            "bits_per_weight": self.bits_per_weight,
            "tables": [record.to_json() for record in self.tables],
            "measured": self.measured,
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "GgufRecord":
        """The inverse of `to_json`."""
        types = {name: (one["tensors"], one["bytes"]) for name, one in found["types"].items()}
        return GgufRecord(
            types, found["bits_per_weight"], tuple(map(LinearRecord.from_json, found["tables"])), found["measured"]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a quantization run did: to which linear, what it left out and why, at which cost; enough to run it again.

    model               as it was named: a Hub id, a folder, or None for a module in memory that has no name
    model_revision      commit of the Hub's repository, where it came from there; model_fingerprint: of its content
    recipe              every key of it, model and calibration included: `Recipe(**report.recipe)`
    calibration         what the run was calibrated on, None without any; versions of quantkit and what it builds on
    weights_quantized   share of the decoder's linear weights; bits_per_weight of these, scales and zero points included
    bytes_before, bytes_after   tensor data of the source and of the output
    rotation            what the rotation turned and proved, None without one; kv_cache the cache's scheme, None: as is
    gguf                what a GGUF file holds; None for a folder of safetensors
    held_out            beside the original on text that was not calibrated on; None where nothing was calibrated
    seconds             by stage; files: sha256 of every file of the output
    """

    quantkit: str
    model: str | None
    model_revision: str | None = None
    model_fingerprint: str = ""
    recipe: Json
    calibration: CalibrationRecord | None
    versions: dict[str, str]
    device: str
    coverage: str
    weights_quantized: float
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    blocks: tuple[BlockRecord, ...]
    held_out: HeldOutRecord | None = None
    gguf: GgufRecord | None = None
    skipped: tuple[SkippedLinear, ...]
    rotation: Json | None
    kv_cache: str | None
    folds_rejected: tuple[RejectedFold, ...]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    files: dict[str, str]

    @property
    def linears(self) -> tuple[LinearRecord, ...]:
        """Every quantized linear, in the order of the run."""
        return tuple(record for block in self.blocks for record in block.linears)

    @property
    def output_error(self) -> float:
        """Mean over the quantized linears of the squared output error over the output's energy."""
        return sum(record.error for record in self.linears) / max(1, len(self.linears))

    @property
    def folds(self) -> tuple[FoldRecord, ...]:
        """Every fold, in the order of the run."""
        return tuple(record for block in self.blocks for record in block.folds)

    @property
    def seconds_total(self) -> float:
        """Seconds of the whole run, of its last process where it was resumed."""
        return round(sum(self.seconds.values()), 3)

    def to_json(self) -> Json:
        """The content of quantkit-report.json."""
        return {
            "quantkit": self.quantkit,
            "model": self.model,
            "model_revision": self.model_revision,
            "model_fingerprint": self.model_fingerprint,
            "recipe": self.recipe,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "versions": self.versions,
            "device": self.device,
            "coverage": self.coverage,
            "weights_quantized": self.weights_quantized,
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "output_error": self.output_error,
            "held_out": None if self.held_out is None else self.held_out.to_json(),
            "gguf": None if self.gguf is None else self.gguf.to_json(),
            "linears": [{"block": block.block, **one.to_json()} for block in self.blocks for one in block.linears],
            "skipped": [{"name": one.name, "reason": one.reason} for one in self.skipped],
            "folds": [{"block": block.block, **fold.to_json()} for block in self.blocks for fold in block.folds],
            "rotation": self.rotation,
            "kv_cache": self.kv_cache,
            "folds_rejected": [{"pair": one.pair, "reason": one.reason} for one in self.folds_rejected],
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "seconds_total": self.seconds_total,
            "peak_memory_bytes": self.peak_memory_bytes,
            "files": self.files,
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Report":
        """The inverse of `to_json`. UserError for what is not the report of a quantization run."""
        try:
            plain = {name: content[name] for name in Report.__slots__ if name in content}
            calibration = content["calibration"]
            made = {
                "calibration": None if calibration is None else CalibrationRecord.from_json(calibration),
                "held_out": None if (held := content["held_out"]) is None else HeldOutRecord.from_json(held),
                "gguf": None if (gguf := content.get("gguf")) is None else GgufRecord.from_json(gguf),
                "blocks": _blocks(content["linears"], content["folds"]),
                "skipped": tuple(SkippedLinear(**one) for one in content["skipped"]),
                "folds_rejected": tuple(RejectedFold(**one) for one in content["folds_rejected"]),
                "warnings": tuple(content["warnings"]),
            }
            return Report(**plain | made)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"not the report of a quantization run by this version of quantkit: {type(error).__name__}: {error}"
            ) from error

    @staticmethod
    def load(path: str | Path) -> "Report":
        """The report of a finished run: of its folder, or of the JSON file itself. UserError where there is none."""
        file = user_path(path)
        file = file / REPORT if file.is_dir() else file
        try:
            return Report.from_json(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # UserError is one too
            raise UserError(f"{file}: {error}") from error


def _blocks(linears: list[Json], folds: list[Json]) -> tuple[BlockRecord, ...]:
    """The records of each block, from the report's two lists."""
    indices = sorted({line["block"] for line in (*linears, *folds)})
    return tuple(
        BlockRecord(
            index,
            tuple(FoldRecord.from_json(line) for line in folds if line["block"] == index),
            tuple(LinearRecord.from_json(line) for line in linears if line["block"] == index),
        )
        for index in indices
    )
