"""The images of a folder with their captions and masks, and image files as upright RGB on white."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from ..core.errors import UserError, did_you_mean
from ..core.files import (
    counted,
    folder_or_id,
    is_file,
    quoted,
    read_text,
)
from ..mini import FOLDERS

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
METADATA = ("metadata.jsonl", "metadata.csv")
MASK = ".mask"
"""End of a mask's name before its suffix: dog.mask.png is the mask of dog.jpg."""
NAMES_IN_SENTENCE = 8
"""Files that a sentence names at most."""
KOHYA_FOLDER = re.compile(r"\d{1,3}_.+")
"""Names of folders in kohya's layout, REPEATS_PROMPT, such as "10_TOK dog"."""
MAX_CAPTION_BYTES = 100_000
MAX_ENTRIES = 200_000
"""Files and folders below a set of images; more are the root of a disk, or somebody's home."""


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


@dataclass(frozen=True)
class Listing:
    """The files of a folder, then those of its subfolders; without hidden ones."""

    folder: Path
    files: Sequence[Path]

    @cached_property
    def _pictures(self) -> list[Path]:
        """Images that can be read, without masks."""
        return [p for p in self.files if _is_image(p) and stem_of_masked(p) is None]

    @cached_property
    def metadata(self) -> list[Path]:
        """The metadata files in it."""
        return [self.folder / name for name in METADATA if is_file(self.folder / name)]

    @cached_property
    def images(self) -> list[Path]:
        """The images directly in it, without masks."""
        return [path for path in self._pictures if path.parent == self.folder]

    @cached_property
    def texts(self) -> dict[str, Path]:
        """``.txt`` files by their stems."""
        # In any case of letters: cameras and old systems write .TXT.
        return {stem(path): path for path in self.files if path.suffix.lower() == ".txt"}

    @property
    def has_captions(self) -> bool:
        """Test for a ``.txt`` file beside an image."""
        return any(stem(path) in self.texts for path in self._pictures)

    def captions(self, images: Sequence[Path]) -> list[str | None]:
        """The text of the ``.txt`` file beside each image, as one line; None where none is."""
        captions: list[str | None] = []
        for image in images:
            path = self.texts.get(stem(image))
            caption = None
            if path is not None:
                name = f"the caption {path.relative_to(self.folder)}"
                caption = " ".join(read_text(path, name, MAX_CAPTION_BYTES).split())
            captions.append(caption)
        return captions

    def left_out(
        self, images: Sequence[Path], masks: Collection[Path], *, captioned: bool
    ) -> str | None:
        """Number and names of the files that are not read, or None."""
        read_files = {*images, *masks}
        if captioned:
            read_files |= {self.texts.get(stem(path), path) for path in images}
        unread = []
        for path in self.files:
            if path not in read_files and path.name not in METADATA:
                unread.append(path)
        if not unread:
            return None
        names = []
        for path in unread[:NAMES_IN_SENTENCE]:
            names.append(quoted(path.relative_to(self.folder)).strip('"'))
        if len(unread) > NAMES_IN_SENTENCE:
            names.append("...")
        sentence = f"{counted(len(unread), 'file')} ({', '.join(names)})"
        unreadable = HEIF_SUFFIXES - image_suffixes()
        if any(path.suffix.lower() in unreadable for path in unread):
            sentence += "; `pip install pillow-heif` makes HEIC readable"
        return sentence


def folder_of_set(name: str, option: str) -> Path | None:
    """The folder that the name of a set stands for, or None of a set on the hub.

    Raises:
        UserError: it can be none of both; the sentence names the ``option``.
    """
    if name in FOLDERS:
        return FOLDERS[name]
    folder = folder_or_id(name, option)
    if folder is None and "/" not in name:  # ids of sets have an owner
        folders_here = _names_in(Path())[0]
        raise UserError(
            f"{option} {quoted(name)} is no folder here"
            f"{did_you_mean(name, [*folders_here, *FOLDERS])}: give the path of a folder, or"
            " OWNER/NAME of a set on the hub."
        )
    return folder


def list_folder(folder: Path) -> Listing:
    """List a folder and, without metadata, its subfolders; links to folders are not followed."""
    folder = folder.resolve()
    files, count = list[Path](), 0
    has_metadata = bool(Listing(folder, ()).metadata)

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(
                f'"{folder}" can\'t be read ({error.strerror}): change its permissions.'
            ) from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        count += len(folders) + len(names)
        if count > MAX_ENTRIES and not has_metadata:
            raise UserError(
                f'"{folder}" holds more than {MAX_ENTRIES:,} files and folders, which is hardly a'
                " set of images: give the folder of the images alone, or put a metadata.jsonl that"
                " lists them into it."
            )
        names += [name for name in folders if Path(place, name).is_symlink()]
        # In place: `os.walk` goes on with what is left.
        folders[:] = [name for name in folders if not name.startswith(".") and not has_metadata]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    # By name, the folder's own files first.
    return Listing(folder, sorted(files, key=lambda path: (path.parent != folder, path)))


def stem(path: Path) -> str:
    """A file's path without its ending."""
    return os.path.splitext(path)[0]


def stem_of_masked(path: Path) -> str | None:
    """The stem of the image whose mask a file is by its name; None of what is no mask."""
    name = stem(path)
    return name[: -len(MASK)] if name.lower().endswith(MASK) else None


def masks_beside(images: Sequence[Path]) -> dict[Path, Path]:
    """The masks that lie beside images, by their images.

    Raises:
        UserError: an image has several.
    """
    stems = {stem(image) for image in images}  # paths without their endings
    masks = dict[str | None, Path]()
    for folder in {image.parent for image in images}:
        for name in sorted(_names_in(folder)[1]):
            mask = folder / name
            masked = stem_of_masked(mask)  # dog for dog.mask.png
            if masked not in stems or not _is_image(mask):
                continue
            if masked in masks:
                raise UserError(
                    f'"{masks[masked]}" and "{mask}" are masks of one image: keep one of them.'
                )
            masks[masked] = mask
    return {image: masks[stem(image)] for image in images if stem(image) in masks}


def unread_folder_name(images: Sequence[Path]) -> str | None:
    """The name of a folder with images that gives repeats and a prompt to kohya's scripts."""
    # kohya's scripts would take "10_TOK dog" for ten repeats with the prompt "TOK dog".
    names = {image.parent.name for image in images}
    return min((name for name in names if KOHYA_FOLDER.fullmatch(name)), default=None)


def _is_image(path: Path) -> bool:
    """Test for a file with the name of an image that can be read."""
    return path.suffix.lower() in image_suffixes() and is_file(path)


def _names_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder; none where it may not be listed."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    return folders, files
