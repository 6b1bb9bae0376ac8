"""Matplotlib figures as PNG files, without a screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .durable import replacing

DPI = 120


@contextmanager
def new_figure(path: Path, dpi: int = DPI, **options: Any) -> Iterator[Any]:
    """Context manager: yields a matplotlib figure and writes it at the end, whole or not at all.

    Args:
        path: a PNG file.
        dpi: dots per inch.
        options: those of `matplotlib.figure.Figure`, such as ``figsize`` and ``layout``.
    """
    # Imported lazily, since it is slow. Not pyplot, which keeps figures in memory and needs a
    # screen.
    from matplotlib.figure import Figure

    figure = Figure(**options)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
