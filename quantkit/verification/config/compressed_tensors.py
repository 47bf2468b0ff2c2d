"""The config of compressed-tensors, read the way version 0.17 does: the one vLLM 0.33 is pinned to.

Source of the rules: compressed_tensors.quantization.quant_args and quant_scheme.
"""

import re
from typing import Any

from quantkit.checkpoint.header import DTYPES
from quantkit.verification.findings import (
    Finding,
    error,
    warning,
)
from quantkit.verification.subject import (
    DeclaredNumbers,
    DeclaredScheme,
    Subject,
    fused_name,
    leaf,
    matches,
    siblings,
)

KEYS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
FORMATS = {
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
}
TORCH_DTYPES = {name for name, _ in DTYPES.values()} | {"half", "float", "double", "int", "long", "short"}
STRATEGIES = {"tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"}
ORDERS = {"group": "group", "dynamic": "group", "weight": "weight", "static": "weight"}
_LINEAR_CLASSES = ("qkvparallellinear", "mergedcolumnparallellinear", "rowparallellinear", "columnparallellinear")
_TO_DO = "write one of the schemes compressed-tensors 0.17 knows"


def numbers(raw: Any, where: str, found: list[Finding], newer: bool = False) -> DeclaredNumbers | None:
    """The number format of `weights` or `input_activations`; None, and why in `found`, when it is not a valid one.

    newer: also what came after 0.17, for engines that are not bound to it.
    """
    start = len(found)

    def bad(message: str, remedy: str = _TO_DO, rule: str = "ct-arguments") -> None:
        found.append(error(rule, where, message, remedy))

    if not isinstance(raw, dict):
        bad(f"there is {raw!r} where a number format should be")
        return None
    for key in sorted(raw.keys() - KEYS):
        bad(f"compressed-tensors 0.17 knows no field {key!r} and refuses the config", f"drop {key}", "ct-unknown-key")
    bits, kind, strategy = raw.get("num_bits", 8), raw.get("type", "int"), raw.get("strategy")
    group_size, block, dynamic = raw.get("group_size"), raw.get("block_structure"), raw.get("dynamic", False)
    symmetric, order = raw.get("symmetric", True), raw.get("actorder")
    if isinstance(bits, str) and bits.isdecimal():
        bits = int(bits)
    if type(bits) is not int:
        bad(f"num_bits is {bits!r}, not a whole number")
    kind, strategy, dynamic = (
        value.lower() if isinstance(value, str) else value for value in (kind, strategy, dynamic)
    )
    if kind not in ("int", "float"):
        bad(f"type is {kind!r}, neither int nor float")
    if symmetric not in (True, False):
        bad(f"symmetric is {symmetric!r}, neither true nor false")
    if dynamic not in (True, False, "local"):
        bad(f"dynamic is {dynamic!r}; it may be true, false or 'local'")
    if strategy is not None and (not isinstance(strategy, str) or strategy not in STRATEGIES):
        bad(f"strategy is {strategy!r}; there are {', '.join(sorted(STRATEGIES))}")
    if group_size is not None and (type(group_size) is not int or group_size < -1):
        bad(f"group_size is {group_size!r}; it is a positive number, or -1 for channels")
    for key in ("scale_dtype", "zp_dtype"):
        name = raw.get(key)
        if name is not None and str(name).removeprefix("torch.") not in TORCH_DTYPES:
            bad(f"{key} {name!r} is not a torch dtype")
    if order is True or (isinstance(order, str) and order.lower() in ORDERS):
        order = "group" if order is True else ORDERS[order.lower()]
    elif order in (None, False):
        order = None
    else:
        bad(f"actorder is {order!r}; drop it", "omit actorder")
    if isinstance(block, str):
        block = [int(part) if part.isdecimal() else None for part in block.split("x")]
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        bad(f"block_structure is {block!r}, not two sizes")
    if len(found) > start:
        return None
    grouped = group_size is not None and group_size > 0
    if strategy is None:
        strategy = "tensor" if group_size is None else "group" if grouped else "channel" if group_size == -1 else "?"
    if strategy == "?":
        bad(f"group_size {group_size} is neither a size nor -1")
    if strategy == "token" and not dynamic:
        bad("strategy 'token' is only for dynamic numbers", "set dynamic: true")
    if (strategy in ("group", "tensor_group")) != grouped:
        bad(f"strategy {strategy!r} with group_size {group_size}: a group size goes with 'group' or 'tensor_group'")
    if (strategy == "block") != (block is not None):
        bad("strategy 'block' and block_structure go together", "write both, or neither")
    if order == "group" and not grouped:
        bad("actorder 'group' needs groups", "omit actorder")
    if dynamic and strategy not in ("token", "tensor", "tensor_group", "group"):
        bad(f"dynamic numbers cannot have strategy {strategy!r}")
    if dynamic == "local" and strategy != "tensor_group":
        bad("dynamic 'local' is for strategy 'tensor_group' alone")
    if kind == "float" and bits not in ((4, 6, 8) if newer else (4, 8)) and raw.get("zp_dtype") is None:
        bad(f"compressed-tensors 0.17 has no {bits}-bit float (mxfp6 came later)", "use 4 or 8 bits")
    if len(found) > start:
        return None
    assert isinstance(bits, int)
    assert isinstance(kind, str)
    assert isinstance(strategy, str)
    pair = (int(block[0] or 0), int(block[1] or 0)) if block else None
    scale = str(raw["scale_dtype"]).removeprefix("torch.") if raw.get("scale_dtype") else None
    size = group_size if grouped and isinstance(group_size, int) else -1
    return DeclaredNumbers(bits, kind, bool(symmetric), strategy, size, pair, dynamic or False, scale, order)


def groups(subject: Subject) -> list[tuple[list[str], DeclaredScheme]]:
    """(targets, what they are stored as) of each valid config group; the rest is in subject.problems."""
    found, qc = subject.problems, subject.qc
    newer = subject.engine == "transformers"
    formats = FORMATS | ({"mxfp6-pack-quantized"} if newer else set())
    raw_groups = qc.get("config_groups")
    if not isinstance(raw_groups, dict) or not raw_groups:
        found.append(
            error("ct-groups", "config_groups", "there are no config groups, so nothing is quantized", "write them")
        )
        return []
    result = []
    for name, raw in raw_groups.items():
        where = f"config_groups.{name}"
        if not isinstance(raw, dict):
            found.append(error("ct-groups", where, f"is {type(raw).__name__}, not an object", "write the scheme out"))
            continue
        targets = raw.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            found.append(
                error("ct-targets", where, "has no list of targets", 'name the modules, e.g. "targets": ["Linear"]')
            )
            continue
        for target in targets:
            found += _bad_regex(target, f"{where}.targets")
        if len(targets) == 1 and targets[0].endswith("Attention"):
            continue  # engines read it as part of the KV cache's format
        weights = numbers(raw.get("weights"), f"{where}.weights", found, newer)
        inputs, outputs = (
            numbers(raw[key], f"{where}.{key}", found, newer) if raw.get(key) else None
            for key in ("input_activations", "output_activations")
        )
        layout = raw.get("format") or qc.get("format")
        if layout is None:
            found.append(
                warning("ct-format", where, "no format is stated, here or globally", "state format in each group")
            )
        elif not isinstance(layout, str) or layout not in formats:
            found.append(
                error(
                    "ct-format",
                    where,
                    f"format {layout!r} is unknown to compressed-tensors 0.17, vLLM 0.33's version, or no longer read",
                    f"use one of {', '.join(sorted(formats))}",
                )
            )
        if weights is not None:
            result.append((targets, DeclaredScheme(str(layout or "none"), weights, inputs, outputs, where)))
    return result


def _bad_regex(pattern: str, where: str) -> list[Finding]:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as problem:
            return [error("ct-regex", where, f"{pattern!r} is not a regex: {problem}", "fix the pattern")]
    return []


def ignored(subject: Subject) -> list[str]:
    """The ignore list; anything but a list of strings is in subject.problems."""
    raw = subject.qc.get("ignore", [])
    if raw is None and subject.engine not in ("vllm", "sglang"):
        return []
    if not isinstance(raw, list) or not all(isinstance(entry, str) for entry in raw):
        message = f"ignore is {raw!r}, not a list of names"
        subject.problems.append(error("ct-ignore", "ignore", message, 'write a list, e.g. ["lm_head"]'))
        return []
    for entry in raw:
        subject.problems.extend(_bad_regex(entry, "ignore"))
    return raw


def state(subject: Subject) -> None:
    """Fill subject.stated for compressed-tensors, by the matching rules of the engine."""
    fusing = subject.engine in ("vllm", "sglang")
    parsed, ignore = groups(subject), ignored(subject)
    subject.groups.extend(said for _, said in parsed)
    head = subject.head
    for name in sorted({*subject.linears, *subject.shapes, head}):
        module = subject.head_module if name == head else name
        names = [module, *([fused_name(name) or name] if fusing else [])]
        if any(matches(each, entry) for each in names for entry in ignore):
            continue
        by_name = (said for targets, said in parsed for target in targets if any(matches(n, target) for n in names))
        by_class = (said for targets, said in parsed for target in targets if _is_linear(target, fusing))
        said = next(by_name, None)
        if said is None and not (fusing and name == head):  # there the head is no Linear
            said = next(by_class, None)
        if said is not None:
            subject.stated[name] = said
    subject.problems.extend(_useless(ignore, subject))
    if fusing:
        subject.problems.extend(_ignored_in_part(ignore, subject))


def _ignored_in_part(ignore: list[str], subject: Subject) -> list[Finding]:
    """Merged layers that no group targets: vLLM refuses an ignore list that holds only some of their members."""
    wrong = []
    for fused, members in siblings({*subject.linears, *subject.shapes}):
        hit = [any(matches(member, entry) for entry in ignore) for member in members]
        whole = any(matches(fused, entry) for entry in ignore)
        if any(hit) and not all(hit) and not whole and not any(member in subject.stated for member in members):
            wrong.append(fused)
    if not wrong:
        return []
    message = f"{len(wrong)} merged layers are ignored in part; {subject.engine} refuses that though none is quantized"
    return [error("fused-partly", wrong[0], message, "ignore all of their members")]


def _is_linear(target: str, fusing: bool) -> bool:
    return any(target.lower() in name for name in _LINEAR_CLASSES) if fusing else target == "Linear"


def _useless(ignore: list[str], subject: Subject) -> list[Finding]:
    """Ignored names that match nothing although they look like a part of a name: there is no substring matching."""
    names = [*subject.linears, *subject.shapes, subject.head_module]
    found = []
    for entry in ignore:
        hit = any(matches(name, entry) or matches(fused_name(name) or name, entry) for name in names)
        if not hit and any(entry in name for name in names) and leaf(entry) not in ("lm_head",):
            message = f"{entry!r} matches no module: it is taken for a whole name, not for a part of one"
            found.append(warning("ct-ignore-part", "ignore", message, f'write "re:.*{re.escape(entry)}.*"'))
    return found
