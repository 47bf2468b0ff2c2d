"""Own documents of the data set `general`: chats from general_chats, maths and tables made from templates."""

import re
from pathlib import Path
from random import Random

from general_maths import worksheet
from general_tables import table

WORKSHEETS, TABLES = 66, 77


def own_documents(chats: Path) -> tuple[list[dict], list[dict]]:
    """Rows for calibration and held out: every eleventh is held out."""
    kept: tuple[list[dict], list[dict]] = ([], [])
    made = [[{"kind": "maths", "text": worksheet(Random(f"maths {i}"))} for i in range(WORKSHEETS)]]
    made.append([{"kind": "tables", "text": table(i, Random(f"table {i}"))} for i in range(TABLES)])
    for rows in (*made, chat_rows(chats)):
        for i, row in enumerate(rows):
            kept[i % 11 == 5].append(row | {"source": "own", "group": "own " + row["kind"]})
    return kept


def chat_rows(folder: Path) -> list[dict]:
    """The conversations of every file in the folder: a line ===== before each, [role] before each message."""
    rows = []
    for path in sorted(folder.glob("*.txt")):
        for conversation in path.read_text(encoding="utf-8").split("=====\n")[1:]:
            parts = re.split(r"^\[(system|user|assistant)\]\n", conversation, flags=re.MULTILINE)[1:]
            messages = [{"role": r, "content": c.strip("\n")} for r, c in zip(parts[::2], parts[1::2], strict=True)]
            rows.append({"kind": "chat", "messages": messages})
    return rows
