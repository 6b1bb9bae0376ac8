"""Two pictures in one place, of which a handle shows one to its left and the other to its right.

The handle is the browser's own range input, so that mouse, finger and arrow keys move it.
"""

from __future__ import annotations

from html import escape

from PIL import Image

from . import pictures

SMALLEST = 384
"""Smaller pictures are enlarged to this side, in pixels."""


def pair(a: Image.Image | None, b: Image.Image | None, labels: tuple[str, str]) -> str:
    """Two pictures as HTML, brought to the size of the first; "" without both."""
    if a is None or b is None:
        return ""
    a, b = (pictures.fitted(picture, SMALLEST) for picture in (a, b))
    b = b.resize(a.size, Image.Resampling.LANCZOS)
    under, over = (pictures.data_uri(picture) for picture in (a, b))
    left, right = (escape(label) for label in labels)
    return (
        f'<figure class="pair"><div><img src="{under}" alt="{left}">'
        f'<img class="over" src="{over}" alt="{right}">'
        f'<input type="range" min="0" max="100" value="50" aria-label="{left} | {right}"></div>'
        f"<figcaption><span>A {left}</span><span>B {right}</span></figcaption></figure>"
    )
