"""Images side by side as in Fig. A1: one prompt a row, one adapter a column, the same seed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..figures import canvas
from .schema import ScoresResult

FILE = "grid.png"
ROWS = 6
CELL_PIXELS = 256
"""Larger images are brought down to this before they are drawn."""
TRUTH = "ground truth"


def draw(
    result: ScoresResult, folder: Path, truths: Mapping[int, Image.Image], rows: int = ROWS
) -> list[str]:
    """Draw the first prompts at the first seed; the images of a row share their initial noise.

    Args:
        result: its images lie in ``folder``.
        truths: prompt -> held-out picture, for a last column.
        rows: how many prompts.

    Returns:
        The picture's name in ``folder``; nothing without a row.
    """
    prompts = [i for i, prompt in enumerate(result.prompts) if not prompt.general][:rows]
    if not prompts:
        return []
    files = {
        (image.prompt, image.adapter): folder / image.file
        for image in result.images
        if image.seed == result.seeds[0]
    }
    heads = [entry.label for entry in result.adapters]
    shown = any(prompt in truths for prompt in prompts)
    columns = len(heads) + shown
    size = (1.5 * columns + 1.2, 1.5 * len(prompts) + 0.4)
    with canvas(folder / FILE, len(prompts), columns, figsize=size) as (_, axes):
        for line, prompt in zip(axes, prompts, strict=True):
            entry = result.prompts[prompt]
            line[0].set_ylabel(_wrapped(entry.instance or entry.text), fontsize=8)
            for adapter, axis in enumerate(line[: len(heads)]):
                _show(axis, _opened(files.get((prompt, adapter))))
            if shown:
                _show(line[-1], truths.get(prompt))
        for axis, head in zip(axes[0], [*heads, TRUTH] if shown else heads, strict=True):
            axis.set_title(_wrapped(head), fontsize=9)
    return [FILE]


def _opened(file: Path | None) -> Image.Image | None:
    if file is None:
        return None
    with Image.open(file) as image:
        return image.convert("RGB")


def _show(axis: Any, image: Image.Image | None) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if image is None:
        axis.set_frame_on(False)
        return
    image = image.copy()
    image.thumbnail((CELL_PIXELS, CELL_PIXELS))
    axis.imshow(image, interpolation="lanczos")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 18)[:3])
