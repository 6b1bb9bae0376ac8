"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what could break it in a cell is escaped."""
    body = ["| " + " | ".join(escaped(cell) for cell in line) + " |" for line in [head, *rows]]
    return "\n".join([body[0], "|" + "---|" * len(head), *body[1:]])


def escaped(text: str) -> str:
    """Text of a user on one line, without what would end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
