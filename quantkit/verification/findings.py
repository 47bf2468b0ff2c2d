"""What verify returns: findings, rows of kernels, and the verdict that holds them."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or worth knowing: what (message), where, and what to do (remedy)."""

    level: Literal["error", "warning", "info"]
    rule: str
    where: str
    message: str
    remedy: str


def error(rule: str, where: str, message: str, remedy: str) -> Finding:
    return Finding("error", rule, where, message, remedy)


def warning(rule: str, where: str, message: str, remedy: str) -> Finding:
    return Finding("warning", rule, where, message, remedy)


def info(rule: str, where: str, message: str, remedy: str) -> Finding:
    return Finding("info", rule, where, message, remedy)


@dataclass(frozen=True, slots=True)
class KernelRow:
    """Modules an engine serves alike: the last parts of their names, how many, their scheme, hardware -> kernel."""

    modules: str
    count: int
    scheme: str
    kernel: dict[str, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a model folder in one engine; engine None: in every engine, each with its own in `engines`.

    verdict    "refused": it does not load, or loads wrong weights; "unknown": nothing here can judge it
    findings   worst first
    hardware   machine -> "yes", "no", "?" or the limit under which it runs there
    """

    path: str
    engine: str | None
    tp: int
    verdict: Literal["loads", "refused", "unknown"]
    findings: list[Finding]
    kernels: list[KernelRow]
    hardware: dict[str, str]
    engines: "dict[str, Verdict] | None" = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without `engines` where there is but one."""
        plain = asdict(self)
        for one in [plain] if self.engines is None else plain["engines"].values():
            del one["engines"]
        return plain
