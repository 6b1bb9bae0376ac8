"""A slider over two pictures, of which it shows one left and the other right of its handle."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from . import pictures

SMALLEST = 384
"""Smaller pictures are enlarged to this side, in pixels."""


def slider(name: str) -> gr.ImageSlider:
    """The widget, which is hidden until it has two pictures; ``name`` is its element's."""
    return gr.ImageSlider(
        elem_id=name,
        type="pil",
        format="png",
        interactive=False,
        buttons=["fullscreen"],
        max_height=420,
        visible=False,
    )


def pair(a: Image.Image | None, b: Image.Image | None, label: str) -> Any:
    """What shows two pictures in it, brought to the size of the first; hides it without both."""
    if a is None or b is None:
        return gr.update(value=None, visible=False)
    a, b = (pictures.fitted(picture, SMALLEST) for picture in (a, b))
    return gr.update(
        value=(a, b.resize(a.size, Image.Resampling.LANCZOS)), label=label, visible=True
    )
