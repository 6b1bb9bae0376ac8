"""Numbers and tables as Markdown; cosines times 100."""

from __future__ import annotations

from collections.abc import Sequence

from ..statistics import Interval


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what could break it in a cell is escaped."""
    body = ["| " + " | ".join(escaped(cell) for cell in line) + " |" for line in [head, *rows]]
    return "\n".join([body[0], "|" + "---|" * len(head), *body[1:]])


def escaped(text: str) -> str:
    """Text of a user on one line, without what would end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def value(cosine: float | None) -> str:
    """A score."""
    return "–" if cosine is None else f"{100 * cosine:.2f}"


def signed(cosine: float) -> str:
    """A difference of scores."""
    return f"{100 * cosine:+.2f}"


def interval(found: Interval | None, form: str = ".2f") -> str:
    """An interval of scores in brackets, ``form`` "+.2f" for differences."""
    if found is None:
        return "[n/a]"
    return f"[{100 * found.low:{form}}, {100 * found.high:{form}}]"
