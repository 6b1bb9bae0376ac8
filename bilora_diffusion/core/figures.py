"""Figures as files, without a screen: what the demo and `eval.plot` draw on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .durable import replacing

DPI = 120


@contextmanager
def new_figure(path: Path, dpi: int = DPI, **options: Any) -> Iterator[Any]:
    """A matplotlib figure, which is written at the end, whole or not at all.

    Args:
        path: a PNG file.
        options: those of `matplotlib.figure.Figure`, such as ``figsize`` and ``layout``.
    """
    # Not pyplot: it would keep the figure in memory, and ask for a screen. Imported here, as it
    # takes a while.
    from matplotlib.figure import Figure

    figure = Figure(**options)
    yield figure
    with replacing(path) as aside:
        figure.savefig(aside, dpi=dpi)
