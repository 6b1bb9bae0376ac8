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
# Formats of phone cameras. Pillow reads them if the package pillow-heif is installed.
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
# Errors that Pillow raises for files that are damaged, far too large or of an unknown format.
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
_ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # Pillow modes
METADATA = ("metadata.jsonl", "metadata.csv")
MASK = ".mask"  # end of a mask's stem: dog.mask.png is the mask of dog.jpg
NAMES_IN_SENTENCE = 8  # maximum number of files that a message names
# Matches folder names in kohya's layout, REPEATS_PROMPT, such as "10_TOK dog".
KOHYA_FOLDER = re.compile(r"\d{1,3}_.+")
MAX_CAPTION_BYTES = 100_000
# Maximum number of files and folders in an image set without a metadata file. A home folder or a
# disk's root has more.
MAX_ENTRIES = 200_000


@functools.cache
def reads_heif() -> bool:
    """Register pillow-heif with Pillow if it is installed, and return whether it is."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of readable image files, in lower case."""
    if reads_heif():
        return IMAGE_SUFFIXES | HEIF_SUFFIXES
    return IMAGE_SUFFIXES


def _open(source: Path | bytes) -> Image.Image:
    """Open an image file, or the content of one."""
    reads_heif()
    if isinstance(source, bytes):
        return Image.open(BytesIO(source))
    if source.exists() and not is_file(source):  # opening a pipe would wait for a writer
        raise OSError("it is not a regular file")
    return Image.open(source)


def read_rgb(source: Path | bytes) -> Image.Image:
    """Decode an image file, or the content of one, to upright RGB.

    The EXIF orientation is applied, and transparent parts become white. Palette, CMYK and grayscale
    images are converted. 16-bit grayscale is scaled to 8 bits, not clipped.

    Raises:
        One of ``DECODE_ERRORS`` if the image can't be decoded.
    """
    with _open(source) as image:
        image.load()
        return to_rgb(image)


def read_mask(source: Path | bytes, *, alpha: bool = False) -> Image.Image:
    """Decode a mask to an upright image of mode "L".

    Args:
        alpha: use the image's alpha channel (255 if it has none) instead of its brightness.

    Raises:
        One of ``DECODE_ERRORS`` if the mask can't be decoded.
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
    """Return (height, width) after the EXIF orientation is applied, without decoding any pixels.

    Raises:
        One of ``DECODE_ERRORS`` if the header can't be read.
    """
    with _open(source) as image:
        # A PNG's own `getexif` would decode the pixels, since metadata can follow them.
        exif = Image.Image.getexif(image)
        width, height = image.size
        if isinstance(image, TiffImageFile):
            # On opening a TIFF, most versions of Pillow rotate its size but keep its orientation.
            # The tags have the size before rotation.
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        is_rotated = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)  # by a quarter turn
        if is_rotated:
            return width, height
        return height, width


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image to upright RGB, as `read_rgb` does.

    Raises:
        ValueError: the pixels are floating-point numbers.
    """
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
    """Raise ValueError for floating-point pixels."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save the image with 8 bits")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to mode "L", or to "LA" if the file declares a transparent level."""
    levels = np.asarray(image)
    values = levels.astype(np.float64)
    # The values of mode "I" can also be 8-bit ones. A value above 255 shows that they are not.
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
    """The files of a folder, followed by those of its subfolders. Hidden files are left out."""

    folder: Path
    files: Sequence[Path]

    @cached_property
    def all_images(self) -> list[Path]:
        """All files with the suffix of a readable image, without masks."""
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
        """The metadata files directly in the folder."""
        return [self.folder / name for name in METADATA if is_file(self.folder / name)]

    @cached_property
    def texts(self) -> dict[str, Path]:
        """The ``.txt`` files, by stem."""
        # Some systems write the suffix in upper case.
        return {stem(path): path for path in self.files if path.suffix.lower() == ".txt"}

    @property
    def has_captions(self) -> bool:
        """True if any image has a ``.txt`` file next to it."""
        return any(stem(path) in self.texts for path in self.all_images)

    def captions(self, images: Sequence[Path]) -> list[str | None]:
        """Return the text of each image's ``.txt`` file as one line; None for a missing file."""
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
        """Return the number and names of unread files for a message; None if all files are read.

        Args:
            images: the images that are read.
            masks: the mask files that are read.
            captioned: whether the captions in ``.txt`` files are read.
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
    """Return the folder of an image set, or None for a set on the hub.

    Args:
        name: one of `mini.FOLDERS`, a path or a hub id.
        option: the option that names the set, for messages.

    Raises:
        UserError: ``name`` is neither a folder nor a possible hub id.
    """
    if name in FOLDERS:
        return FOLDERS[name]
    folder = folder_or_id(name, option)
    if folder is None and "/" not in name:  # ids of data sets have an owner
        folders_here, _ = _names_in(Path())
        hint = did_you_mean(name, [*folders_here, *FOLDERS])
        raise UserError(
            f"{option} {quoted(name)} is not a folder here{hint}: give the path of a folder, or"
            " the OWNER/NAME of a set on the hub."
        )
    return folder


def list_folder(folder: Path) -> Listing:
    """List a folder's files and, if it has no metadata file, those of its subfolders.

    Symbolic links to folders are listed, but not followed.

    Raises:
        UserError: the folder can't be read, or has more than ``MAX_ENTRIES`` files and folders and
            no metadata file.
    """
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
                f'"{folder}" holds more than {MAX_ENTRIES:,} files and folders, too many for'
                " a set of images: give a folder that holds only the images, or add a"
                " metadata.jsonl that lists them."
            )
        names += [name for name in folders if Path(place, name).is_symlink()]
        files += [Path(place, name) for name in names if not name.startswith(".")]
        # Changed in place, since `os.walk` visits the folders that remain in this list.
        folders[:] = [name for name in folders if not name.startswith(".") and not has_metadata]
    # Sorted by path, but the files directly in the folder come first.
    return Listing(folder, sorted(files, key=lambda path: (path.parent != folder, path)))


def stem(path: Path) -> str:
    """Return a file's path without its suffix."""
    return os.path.splitext(path)[0]


def stem_of_masked(path: Path) -> str | None:
    """Return the stem of the image that a mask belongs to; None if the file is not a mask."""
    name = stem(path)
    if name.lower().endswith(MASK):
        return name[: -len(MASK)]
    return None


def masks_beside(images: Sequence[Path]) -> dict[Path, Path]:
    """Return the mask files next to images, by image. Images without a mask are left out.

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
                    f'"{masks[image_stem]}" and "{mask}" are masks of the same image: keep one of'
                    " them."
                )
            masks[image_stem] = mask
    return {image: masks[stem(image)] for image in images if stem(image) in masks}


def unread_folder_name(images: Sequence[Path]) -> str | None:
    """Return the first folder name that kohya's scripts would read as repeats and a prompt.

    Returns None if there is no such folder.
    """
    names = {image.parent.name for image in images}
    return min(filter(KOHYA_FOLDER.fullmatch, names), default=None)


def _is_image(path: Path) -> bool:
    """Return whether a file has the suffix of a readable image."""
    return path.suffix.lower() in image_suffixes() and is_file(path)


def _names_in(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of a folder's subfolders and files; two empty lists if it can't be read."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    return folders, files
