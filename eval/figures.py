"""Figures as files: matplotlib without a screen, each picture written in one piece."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilora_diffusion.durable import TEMPORARY

DPI = 120


@contextmanager
def canvas(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """A figure and its axes, (rows, columns) also for one; the picture is written at the end.

    Args:
        options: of ``subplots``, such as ``figsize``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options = {"layout": "constrained", **options}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
    aside = path.with_name(TEMPORARY + path.name)
    try:
        yield figure, axes
        figure.savefig(aside, dpi=DPI)
    finally:
        plt.close(figure)
    os.replace(aside, path)
