"""Image files of every usual kind as upright RGB on white."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from ..core.files import is_file

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
"""Of telephones; Pillow reads it where the package pillow-heif is installed."""

DECODE_ERRORS = (
    *(OSError, EOFError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError),
    *(RuntimeError, MemoryError, zlib.error, struct.error, Image.DecompressionBombError),
)
"""Errors of Pillow on files that are damaged, of an unknown kind, or absurdly large."""

_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@functools.cache
def reads_heif() -> bool:
    """Let Pillow read HEIC files, if the package for it is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def image_suffixes() -> frozenset[str]:
    """Ends of the names of images that can be read, in lower case."""
    return IMAGE_SUFFIXES | HEIF_SUFFIXES if reads_heif() else IMAGE_SUFFIXES


def _open(source: Path | bytes) -> Image.Image:
    reads_heif()
    if isinstance(source, bytes):
        return Image.open(BytesIO(source))
    if source.exists() and not is_file(source):  # a pipe would keep everyone waiting
        raise OSError("it is not a regular file")
    return Image.open(source)


def read_rgb(source: Path | bytes) -> Image.Image:
    """Decode a file, or a file's content, to RGB.

    The EXIF orientation is applied, transparent parts are laid on white, palettes, CMYK and
    grayscale are converted, and 16-bit grayscale is scaled to 8 bits instead of clipped.

    Raises:
        One of ``DECODE_ERRORS`` if it can't be decoded.
    """
    with _open(source) as image:
        image.load()
        return to_rgb(image)


def read_mask(source: Path | bytes, *, alpha: bool = False) -> Image.Image:
    """Decode a mask, upright, mode "L": its brightness, or its opacity, 255 where it has none.

    Raises:
        One of ``DECODE_ERRORS`` if it can't be decoded.
    """
    if not alpha:
        return read_rgb(source).convert("L")
    with _open(source) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BIT:
            image = _eight_bit(image)
        return image.convert("RGBA").getchannel("A")  # 255 where the image has none


def upright_size(source: Path | bytes, *, decode: bool) -> tuple[int, int]:
    """(height, width) after the EXIF orientation; ``decode`` reads every pixel as a check.

    Raises:
        One of ``DECODE_ERRORS`` if it can't be read.
    """
    with _open(source) as image:
        if decode:
            image.load()
            _require_known_range(image)
        # Pillow's own getexif of a PNG would decode it, for metadata behind the pixels.
        exif = image.getexif() if decode else Image.Image.getexif(image)
        turned = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
        if isinstance(image, TiffImageFile) and not decode:
            # Most versions of Pillow turn a TIFF's size when they open it, its pixels when they
            # decode it, and drop the orientation only then.
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        return (width, height) if turned else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright RGB; see ``read_rgb``."""
    image = ImageOps.exif_transpose(image)
    _require_known_range(image)
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, straight).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _require_known_range(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 bits")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit gray as mode "L", or "LA" where a level is declared transparent."""
    levels = np.asarray(image)
    values = levels.astype(np.float64)
    # Mode I may hold 8-bit values as well; everything above 255 is 16-bit.
    if image.mode != "I" or values.max(initial=0) > 255:
        values = values / 257
    gray = Image.fromarray(values.round().clip(0, 255).astype(np.uint8), mode="L")
    transparent = image.info.get("transparency")
    if transparent is not None:
        opacity = np.where(levels == transparent, 0, 255).astype(np.uint8)
        gray.putalpha(Image.fromarray(opacity))
    return gray
