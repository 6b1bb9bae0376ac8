"""Pictures on their way to the browser: read, enlarged, and written into the page itself.

Pictures go into the page as data, so that no route has to serve files.
"""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from bilora_diffusion import mini

from .catalog import Catalog

SMALLEST, LARGEST = 256, 768
"""Sides in pixels between which a picture is shown."""


def read(path: Path) -> Image.Image | None:
    """An RGB picture; None when it is not there or can't be read."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        return None
    except Image.DecompressionBombError:
        return None


def fitted(picture: Image.Image, smallest: int = SMALLEST) -> Image.Image:
    """The picture with its longer side between ``smallest`` and ``LARGEST``, by Lanczos."""
    side = max(picture.size)
    wanted = min(max(side, smallest), LARGEST)
    if wanted == side:
        return picture
    size = (max(1, round(n * wanted / side)) for n in picture.size)
    width, height = size
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def data_uri(picture: Image.Image) -> str:
    """The picture, fitted, as a ``data:`` address."""
    shown = fitted(picture)
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=92, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def address(path: Path) -> str | None:
    """A picture's file as a ``data:`` address; None when it is not there or can't be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _address(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _address(path: Path, changed: int, size: int) -> str | None:
    picture = read(path)
    return data_uri(picture) if picture else None


def tag(address: str | None, label: str) -> str:
    """A picture that a click or the Enter key enlarges, as HTML; "" without one."""
    if address is None:
        return ""
    label = escape(label)
    return f'<img src="{address}" alt="{label}" class="zoom" tabindex="0" role="button">'


def named(catalog: Catalog, folder: str, name: str | None, package: Path) -> Image.Image | None:
    """A picture that a result names: a file of its folder, else one that comes with the package.

    Args:
        folder: of the result, relative to the root.
        name: as the result has it.
        package: folder of the package's own pictures; only plain names are looked for there.

    Raises:
        UserError: the name leads out of the root.
    """
    if not name:
        return None
    found = read(catalog.resolve(f"{folder}/{name}"))
    if found is None and name == Path(name).name:
        found = read(package / name)
    return found


def truth(catalog: Catalog, folder: str, name: str | None) -> Image.Image | None:
    """The held-out picture that a prompt describes.

    Raises:
        UserError: the name leads out of the root.
    """
    return named(catalog, folder, name, mini.heldout_dir())


def nearest(catalog: Catalog, folder: str, name: str | None) -> Image.Image | None:
    """The training picture that an image is most like.

    Raises:
        UserError: the name leads out of the root.
    """
    return named(catalog, folder, name, mini.train_dir())
