"""The engine stays small enough to be read in one sitting."""

import ast
import io
import tokenize
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[3] / "quantkit" / "runtime" / "engine"
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Lines that are no blank, comment or docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_it_can_be_read_in_one_sitting() -> None:
    sizes = {path.name: code_lines(path.read_text()) for path in sorted(ENGINE.glob("*.py"))}
    total = sum(sizes.values())
    print(f"{total} lines of code without comments and blanks: {sizes}")
    assert total <= 1500


def test_what_counts() -> None:
    assert (
        code_lines('"""Doc\nstring."""\n\n# comment\nx = (\n    1\n)\n\ndef f():\n    """Doc."""\n    return "a"\n')
        == 5
    )
