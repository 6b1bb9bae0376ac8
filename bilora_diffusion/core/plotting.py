"""Matplotlib figures that are written to PNG files without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .durable import replacing

DPI = 120


@contextmanager
def new_figure(path: Path, dpi: int = DPI, **options: Any) -> Iterator[Any]:
    """Yield a new matplotlib figure, and write it to ``path`` atomically when the context exits.

    After an exception, nothing is written.

    Args:
        path: the PNG file to write.
        dpi: dots per inch.
        options: arguments of `matplotlib.figure.Figure`, such as ``figsize`` and ``layout``.
    """
    # Imported lazily, since the import is slow. pyplot is not used: it keeps figures in memory and
    # may need a display.
    from matplotlib.figure import Figure

    figure = Figure(**options)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
