"""Durations for people. Light, as the viewer's pages use it without torch."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as a person says them: "48 s", "3 min 12 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
