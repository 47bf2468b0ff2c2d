"""A finding of verify: what is wrong or worth knowing, where, and what to do."""

from dataclasses import dataclass
from typing import Literal


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
