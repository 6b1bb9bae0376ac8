"""Image files: list them with captions and masks, and decode them to upright RGB."""

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
# Formats of phones. Pillow reads them if the package pillow-heif is installed.
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
# Pillow's errors for files that are damaged, unknown or far too large.
DECODE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112  # tag of EXIF
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # modes of Pillow
METADATA = ("metadata.jsonl", "metadata.csv")
MASK = ".mask"  # a mask's name ends in it: dog.mask.png is the mask of dog.jpg
NAMES_IN_SENTENCE = 8  # at most so many files are named in a message
# Folder names in kohya's layout, REPEATS_PROMPT, such as "10_TOK dog".
KOHYA_FOLDER = re.compile(r"\d{1,3}_.+")
MAX_CAPTION_BYTES = 100_000
# Limit of files and folders in an image set; the root of a disk or a home folder has more.
MAX_ENTRIES = 200_000


@functools.cache
def reads_heif() -> bool:
    """Let Pillow read HEIC files if the package for them is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def image_suffixes() -> frozenset[str]:
    """Suffixes of image files that can be read, in lower case."""
    if reads_heif():
        return IMAGE_SUFFIXES | HEIF_SUFFIXES
    return IMAGE_SUFFIXES


def _open(source: Path | bytes) -> Image.Image:
    """Open a file, or a file's content."""
    reads_heif()
    if isinstance(source, bytes):
        return Image.open(BytesIO(source))
    if source.exists() and not is_file(source):  # opening a pipe would wait for a writer
        raise OSError("it is not a regular file")
    return Image.open(source)


def read_rgb(source: Path | bytes) -> Image.Image:
    """Decode a file, or a file's content, to RGB.

    The EXIF orientation is applied, transparent parts become white, palettes, CMYK and grayscale
    are converted, and 16-bit grayscale is scaled to 8 bits instead of clipped.

    Raises:
        One of ``DECODE_ERRORS`` if it can't be decoded.
    """
    with _open(source) as image:
        image.load()
        return to_rgb(image)


def read_mask(source: Path | bytes, *, alpha: bool = False) -> Image.Image:
    """Decode a mask, upright, mode "L".

    Args:
        alpha: use the file's alpha channel, 255 if it has none, instead of its brightness.

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
        return image.convert("RGBA").getchannel("A")


def upright_size(source: Path | bytes) -> tuple[int, int]:
    """(height, width) after the EXIF orientation, without decoding the pixels.

    Raises:
        One of ``DECODE_ERRORS`` if it can't be read.
    """
    with _open(source) as image:
        # For a PNG `getexif` would decode the pixels, since metadata can follow them.
        exif = Image.Image.getexif(image)
        width, height = image.size
        if isinstance(image, TiffImageFile):
            # Most versions of Pillow rotate a TIFF's size when they open it, its pixels when they
            # decode it, and drop the orientation only then.
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        is_rotated = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)  # by a quarter turn
        if is_rotated:
            return width, height
        return height, width


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image of Pillow to upright RGB, as `read_rgb` does."""
    image = ImageOps.exif_transpose(image)
    _require_known_range(image)
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode != "RGB":
        return image.convert("RGB")
    return image


def _require_known_range(image: Image.Image) -> None:
    """Refuse floating-point pixels."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 bits")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to mode "L", or to "LA" if the file declares a transparent level."""
    levels = np.asarray(image)
    values = levels.astype(np.float64)
    # Mode I can have 8-bit values too; a value above 255 shows that they are 16-bit.
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
    """The files of a folder and then of its subfolders, without hidden ones."""

    folder: Path
    files: Sequence[Path]

    @cached_property
    def all_images(self) -> list[Path]:
        """Images that can be read, without masks."""
        images = []
        for path in self.files:
            if _is_image(path) and stem_of_masked(path) is None:
                images.append(path)
        return images

    @cached_property
    def images(self) -> list[Path]:
        """The images directly in the folder."""
        return [path for path in self.all_images if path.parent == self.folder]

    @cached_property
    def metadata(self) -> list[Path]:
        """The metadata files in the folder."""
        return [self.folder / name for name in METADATA if is_file(self.folder / name)]

    @cached_property
    def texts(self) -> dict[str, Path]:
        """``.txt`` files by their stems."""
        # Some systems write .TXT.
        return {stem(path): path for path in self.files if path.suffix.lower() == ".txt"}

    @property
    def has_captions(self) -> bool:
        """True if an image has a ``.txt`` file next to it."""
        return any(stem(path) in self.texts for path in self.all_images)

    def captions(self, images: Sequence[Path]) -> list[str | None]:
        """The text of the ``.txt`` file next to each image, as one line; None without a file."""
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
        """Number and names of the files that are not read, for a message; None if all are read.

        Args:
            captioned: True if the captions in ``.txt`` files are read.
        """
        read_files = {*images, *masks}
        if captioned:
            read_files |= {self.texts[stem(path)] for path in images if stem(path) in self.texts}
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
    """The folder of a set of images, or None for a set on the hub.

    Args:
        name: one of `mini.FOLDERS`, a path or a hub id.
        option: option that names the set, for the message.

    Raises:
        UserError: it is neither a folder nor a hub id.
    """
    if name in FOLDERS:
        return FOLDERS[name]
    folder = folder_or_id(name, option)
    if folder is None and "/" not in name:  # hub ids of sets have an owner
        folders_here, _ = _names_in(Path())
        hint = did_you_mean(name, [*folders_here, *FOLDERS])
        raise UserError(
            f"{option} {quoted(name)} is not a folder here{hint}: give the path of a folder, or"
            " OWNER/NAME of a set on the hub."
        )
    return folder


def list_folder(folder: Path) -> Listing:
    """List a folder and, unless it has a metadata file, its subfolders; links are not followed."""
    folder = folder.resolve()
    has_metadata = bool(Listing(folder, ()).metadata)
    files: list[Path] = []
    count = 0

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
        files += [Path(place, name) for name in names if not name.startswith(".")]
        # In place: `os.walk` continues with the folders that remain in its list.
        folders[:] = [name for name in folders if not name.startswith(".") and not has_metadata]
    # Sorted by name, the files directly in the folder first.
    return Listing(folder, sorted(files, key=lambda path: (path.parent != folder, path)))


def stem(path: Path) -> str:
    """A file's path without its suffix."""
    return os.path.splitext(path)[0]


def stem_of_masked(path: Path) -> str | None:
    """The stem of the image to which a mask's name refers; None if the file is not a mask."""
    name = stem(path)
    if name.lower().endswith(MASK):
        return name[: -len(MASK)]
    return None


def masks_beside(images: Sequence[Path]) -> dict[Path, Path]:
    """Find the mask files next to images, by image.

    Raises:
        UserError: an image has several masks.
    """
    stems = {stem(image) for image in images}
    masks: dict[str | None, Path] = {}  # by the image's stem
    for folder in {image.parent for image in images}:
        _, names = _names_in(folder)
        for name in sorted(names):
            mask = folder / name
            image_stem = stem_of_masked(mask)
            if image_stem not in stems or not _is_image(mask):
                continue
            if image_stem in masks:
                raise UserError(
                    f'"{masks[image_stem]}" and "{mask}" are masks of one image: keep one of them.'
                )
            masks[image_stem] = mask
    return {image: masks[stem(image)] for image in images if stem(image) in masks}


def unread_folder_name(images: Sequence[Path]) -> str | None:
    """The first folder name that kohya's scripts would read as repeats and a prompt."""
    names = {image.parent.name for image in images}
    return min(filter(KOHYA_FOLDER.fullmatch, names), default=None)


def _is_image(path: Path) -> bool:
    """Test that a file has the suffix of an image that can be read."""
    return path.suffix.lower() in image_suffixes() and is_file(path)


def _names_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder; [] where it may not be listed."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    return folders, files
