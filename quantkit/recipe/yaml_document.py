"""YAML 1.2 text -> plain data that remembers where each key came from, and `--set key.path=value` on top of it.

Read through ruamel.yaml's node graph: it keeps every line number and every duplicate key, and unlike a YAML 1.1 reader
takes `1e-4` for a number and `no` for text. Only mappings, lists, text, numbers, true/false and null are accepted: no
tags, anchors or aliases, so a recipe from a stranger can neither run code nor blow up.
"""

from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

KeyPath = tuple[str | int, ...]
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
TEXT_TAGS = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}  # plain text here
AFTER_THE_FILE = 1 << 30  # the "line" of command-line settings: their problems are listed last


def dotted(path: KeyPath) -> str:
    """The way users write a path, in messages and in --set: `overrides.0.weights.bits`."""
    return ".".join(str(part) for part in path)


@dataclass
class Document:
    """Plain data, the place each path came from as (line, label), and the problems met so far as (line, message).

    contradictions: messages of those problems that no key has by itself
    """

    data: Any
    source: str
    where: dict[KeyPath, tuple[int, str]] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)  # reported while reading: their value is not worth checking
    contradictions: set[str] = field(default_factory=set)

    def report(self, path: KeyPath, message: str) -> str:
        """Note a problem at the nearest place known for `path`: a missing key is reported at its mapping.

        Returns the message with its place.
        """
        known = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.where or n == 0)
        line, label = self.where.get(known, (1, f"{self.source}:1"))
        key = f"{dotted(path)}: " if path else ""
        self.problems.append((line, text := f"{label}: {key}{message}"))
        return text

    def messages(self) -> list[str]:
        """Every problem once, in the order of the file."""
        return list(dict.fromkeys(text for _, text in sorted(self.problems, key=lambda problem: problem[0])))


def parse(text: str, source: str) -> Document:
    """Read one YAML document. Never raises for bad text: what is wrong is in `problems` and `data` is then partial."""
    document = Document(None, source)
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        if root is not None:
            document.data = _plain(root, (), document, set())
    except MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        lines = text.splitlines()
        shown = f"\n    {lines[line - 1].rstrip()}" if line <= len(lines) else ""
        why = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append((line, f"{source}:{line}: not valid YAML: {why}{shown}"))
    except (YAMLError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        document.problems.append((1, f"{source}:1: not valid YAML: {why}"))
    return document


def _plain(node: Node, path: KeyPath, document: Document, seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    document.where.setdefault(path, (line, f"{document.source}:{line}"))
    if id(node) in seen:
        document.unread.add(path)
        document.report(path, "aliases (*name) are not read: write the value out")
        return None
    seen.add(id(node))
    tag = str(node.tag)
    if tag not in PLAIN_TAGS | TEXT_TAGS:
        document.unread.add(path)
        document.report(path, f"tags ({tag}) are not read: a recipe is plain data")
        return None
    if isinstance(node, SequenceNode):
        return [_plain(item, (*path, i), document, seen) for i, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        return _mapping(node, path, document, seen)
    assert isinstance(node, ScalarNode)
    return _scalar(node, path, document)


def _mapping(node: MappingNode, path: KeyPath, document: Document, seen: set[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        label = f"{document.source}:{line}"
        if not isinstance(key_node, ScalarNode) or str(key_node.tag) not in {"tag:yaml.org,2002:str", *TEXT_TAGS}:
            shown = f" {key_node.value}" if isinstance(key_node, ScalarNode) else ""
            document.problems.append((line, f"{label}: {dotted(path) or 'recipe'}: the key{shown} is not text"))
            continue
        key = key_node.value
        if key in found:
            first = document.where[(*path, key)][0]
            message = f"{label}: {dotted((*path, key))}: duplicate key, already given on line {first}"
            document.problems.append((line, message))
            _plain(value_node, (*path, key), Document(None, document.source), seen)  # its own aliases still count
            continue
        document.where[(*path, key)] = (line, label)
        found[key] = _plain(value_node, (*path, key), document, seen)
    return found


def _scalar(node: ScalarNode, path: KeyPath, document: Document) -> Any:
    kind = str(node.tag).rsplit(":", 1)[-1]
    text = str(node.value)
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                digits = text.replace("_", "").lower()
                base = {"0x": 16, "0o": 8, "0b": 2}.get(digits.lstrip("+-")[:2], 10)
                return int(digits, base)
            case "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        document.unread.add(path)
        document.report(path, f"{text[:40]!r} cannot be read as a number")
        return None
    return text


def apply_setting(document: Document, setting: str, label: str | None = None) -> None:
    """Apply one `key.path=value` (value in YAML 1.2) to the data; what cannot be applied is added to the problems.

    label: what messages call it, `--set key.path=value` where nothing else is given.
    """
    label = label or f"--set {setting}"
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        document.problems.append((AFTER_THE_FILE, f"{label}: write it as key.path=value, like weights.group_size=64"))
        return
    value = parse(text, label)
    if value.problems:
        document.problems += [(AFTER_THE_FILE, f"{label}: {text!r} is not a YAML value")]
        return
    apply_value(document, parts, value.data, label)


def apply_value(document: Document, parts: list[str], value: Any, label: str) -> None:
    """Put a value at the path of `parts`; what cannot be applied is added to the problems.

    Whether the path names a real key is left to the check of the whole recipe, which finds it at this label.
    A name given in short (`algorithm: gptq`, a transform in a list) opens up when a path leads into it.
    """
    path, problem = _put(document.data, parts, value)
    if problem:
        document.problems.append((AFTER_THE_FILE, f"{label}: {problem}"))
        return
    for old in [known for known in document.where if known[: len(path)] == path]:
        del document.where[old]
    for n in range(1, len(path) + 1):  # the mappings it had to open are its own as well
        document.where.setdefault(path[:n], (AFTER_THE_FILE, label))


def _put(data: Any, parts: list[str], value: Any) -> tuple[KeyPath, str | None]:
    """Set data[parts] = value in place; returns the path, list positions as integers, and what is in the way if any."""
    path: KeyPath = ()
    holder: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                has = f"positions 0 to {len(holder) - 1}" if holder else "no items yet"
                return path, f"{dotted(path)} is a list with {has}, not {part!r}"
            at: Any = int(part)
        elif isinstance(holder, dict):
            at = part
        else:
            return path, f"{dotted(path)} holds {holder!r}, which has no keys"
        path = (*path, at)
        if last:
            holder[at] = value
        else:
            held = holder.get(at) if isinstance(holder, dict) else holder[at]
            holder[at] = held = _opened(held, path, parts[depth + 1])
            holder = held
    return path, None


def _opened(held: Any, path: KeyPath, next_part: str) -> Any:
    """What a path may walk into: nothing becomes a mapping, a name in short what it stands for."""
    if held is None:
        return {}
    chosen_by_name = path[-1] == "algorithm" or (len(path) == 2 and path[0] == "transforms")
    if chosen_by_name and isinstance(held, str):
        held = {held: {}}
    if path == ("gguf",) and isinstance(held, str):
        held = {"mix": held}
    if path[-1] == "algorithm" and isinstance(held, dict) and next_part not in held:
        return {next_part: {}}  # there is one algorithm: naming another one's option chooses that one
    return held
