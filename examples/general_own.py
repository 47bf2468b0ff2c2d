"""Own documents of the data set `general`: chats from the files beside this one, maths and tables made from templates."""

import json
from pathlib import Path


def own_documents(chats: Path) -> tuple[list[dict], list[dict]]:
    """Rows for calibration and held out."""
    rows = chat_rows(chats)
    return [row for i, row in enumerate(rows) if i % 11 != 5], rows[5::11]


def chat_rows(folder: Path) -> list[dict]:
    """The conversations of every file in the folder."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"kind": "chat", "source": "own", "group": "chat", "messages": json.loads(line)} for line in lines]
