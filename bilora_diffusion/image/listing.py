"""What lies in a folder that is given as a set of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from ..files import is_file, quoted, read_text
from .decode import HEIF_SUFFIXES, image_suffixes

METADATA = ("metadata.jsonl", "metadata.csv")
MASK = ".mask"
"""What the name of a mask ends in, before .png."""
NAMED = 8
MOST_CAPTION_BYTES = 100_000
MOST_ENTRIES = 200_000
"""Files and folders below a set of images; more are the root of a disk, or somebody's home."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder, hidden ones left out; those of subfolders unless it has metadata."""

    folder: Path
    files: tuple[Path, ...]
    deeper: tuple[Path, ...] = ()

    @cached_property
    def metadata(self) -> list[Path]:
        """The metadata files in it."""
        return [path for path in self.files if path.name in METADATA and is_file(path)]

    @property
    def tables(self) -> bool:
        """Whether it holds Parquet or Arrow: images beside these are no data (a preview, say)."""
        return any(path.suffix in (".parquet", ".arrow") for path in (*self.files, *self.deeper))

    @cached_property
    def images(self) -> list[Path]:
        """The images directly in it, without the masks that lie beside them."""
        masks = set(self.masks.values())
        return [path for path in self.files if _is_image(path) and path not in masks]

    @cached_property
    def masks(self) -> dict[str, Path]:
        """Masks by the stem of the image beside them, as name.mask.png is of name.jpg."""
        stems = {stem(path) for path in self.files if _is_image(path)}
        pngs = [path for path in self.files if path.suffix.lower() == ".png"]
        found = {stem(path).removesuffix(MASK): path for path in pngs if MASK in path.name}
        return {name: path for name, path in found.items() if name in stems - {stem(path)}}

    @cached_property
    def texts(self) -> dict[str, Path]:
        """``.txt`` files by their stems."""
        every = (*self.files, *self.deeper)
        return {stem(path): path for path in every if path.suffix.lower() == ".txt"}

    def has_captions(self) -> bool:
        """Whether a ``.txt`` file lies beside an image."""
        return any(stem(p) in self.texts for p in (*self.files, *self.deeper) if _is_image(p))

    def captions(self, images: Sequence[Path]) -> list[str | None]:
        """The text of the ``.txt`` file beside each image, as one line; None where there is none.

        Raises:
            UserError: a caption is no UTF-8 text, or far too long.
        """
        return [path and self._caption(path) for path in map(self.texts.get, map(stem, images))]

    def _caption(self, path: Path) -> str:
        name = f"the caption {path.relative_to(self.folder)}"
        return " ".join(read_text(path, name, MOST_CAPTION_BYTES).split())

    def left_out(self, used: Sequence[Path], *, captioned: bool) -> list[str]:
        """What lies there beside images and is not read, in a few words."""
        taken = {*used, *self.masks.values()}
        if captioned:
            taken |= {self.texts.get(stem(path), path) for path in used}
        every = (*self.files, *self.deeper)
        rest = [path for path in every if path not in taken and path.name not in METADATA]
        if not rest:
            return []
        names = [quoted(path.relative_to(self.folder)).strip('"') for path in rest[:NAMED]]
        heif = any(path.suffix.lower() in HEIF_SUFFIXES - image_suffixes() for path in rest)
        count = f"{len(rest)} file{'s' if len(rest) > 1 else ''}"
        hint = "; `pip install pillow-heif` makes HEIC readable" if heif else ""
        return [f"{count} ({', '.join(names)}{', ...' if len(rest) > NAMED else ''}){hint}"]


def look(folder: Path) -> Listing:
    """List a folder and, without metadata, its subfolders; links to folders are not followed.

    Raises:
        UserError: it may not be read, or holds more than a set of images would.
    """
    count, found = 0, []
    alone = any(is_file(folder / name) for name in METADATA)

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(
                f'"{folder}" can\'t be read ({error.strerror}): change its permissions.'
            ) from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        if (count := count + len(folders) + len(names)) > MOST_ENTRIES and not alone:
            raise UserError(
                f'"{folder}" holds more than {MOST_ENTRIES:,} files and folders, which is hardly a'
                " set of images: give the folder of the images alone, or put a metadata.jsonl that"
                " lists them into it."
            )
        names += [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and not alone]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    direct = [path for path in found if path.parent == folder]
    deeper = [path for path in found if path.parent != folder]
    return Listing(folder, tuple(sorted(direct)), tuple(sorted(deeper)))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes() and is_file(path)


def stem(path: Path) -> str:
    """A file's path without its ending."""
    return os.path.splitext(os.path.abspath(path))[0]
