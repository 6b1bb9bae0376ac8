"""Numbers and tables as Markdown; cosines times 100."""

from __future__ import annotations

from ..markdown import escaped, table
from ..statistics import Interval

__all__ = ["escaped", "interval", "signed", "table", "value"]


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
