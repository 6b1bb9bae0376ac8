"""Contents of a folder that is given as a set of images."""

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
"""End of a mask's name, before .png."""
NAMED = 8
MOST_CAPTION_BYTES = 100_000
MOST_ENTRIES = 200_000
"""Files and folders below a set of images; more are the root of a disk, or somebody's home."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder, then those of its subfolders; without hidden ones."""

    folder: Path
    files: Sequence[Path]

    @cached_property
    def _pictures(self) -> list[Path]:
        suffixes = image_suffixes()
        return [p for p in self.files if p.suffix.lower() in suffixes and is_file(p)]

    @cached_property
    def metadata(self) -> list[Path]:
        """The metadata files in it."""
        return [self.folder / name for name in METADATA if is_file(self.folder / name)]

    @cached_property
    def images(self) -> list[Path]:
        """The images directly in it, without the masks that lie beside them."""
        masks = set(self.masks.values())
        return [p for p in self._pictures if p.parent == self.folder and p not in masks]

    @cached_property
    def masks(self) -> dict[str, Path]:
        """Masks by the stem of the image beside them, as name.mask.png is of name.jpg."""
        stems = {stem(path) for path in self._pictures if path.parent == self.folder}
        pngs = [path for path in self._pictures if path.name.lower().endswith(f"{MASK}.png")]
        return {name: path for path in pngs if (name := stem(path)[: -len(MASK)]) in stems}

    @cached_property
    def texts(self) -> dict[str, Path]:
        """``.txt`` files by their stems."""
        return {stem(path): path for path in self.files if path.suffix.lower() == ".txt"}

    @property
    def has_captions(self) -> bool:
        """Test for a ``.txt`` file beside an image."""
        return any(stem(path) in self.texts for path in self._pictures)

    def captions(self, images: Sequence[Path]) -> list[str | None]:
        """The text of the ``.txt`` file beside each image, as one line; None where none is."""
        return [path and self._caption(path) for path in map(self.texts.get, map(stem, images))]

    def _caption(self, path: Path) -> str:
        name = f"the caption {path.relative_to(self.folder)}"
        return " ".join(read_text(path, name, MOST_CAPTION_BYTES).split())

    def left_out(self, used: Sequence[Path], *, captioned: bool) -> str | None:
        """Number and names of the files that are not read, or None."""
        taken = {*used, *self.masks.values()}
        if captioned:
            taken |= {self.texts.get(stem(path), path) for path in used}
        rest = [p for p in self.files if p not in taken and p.name not in METADATA]
        if not rest:
            return None
        names = [quoted(path.relative_to(self.folder)).strip('"') for path in rest[:NAMED]]
        heif = any(path.suffix.lower() in HEIF_SUFFIXES - image_suffixes() for path in rest)
        count = f"{len(rest)} file{'s' if len(rest) > 1 else ''}"
        hint = "; `pip install pillow-heif` makes HEIC readable" if heif else ""
        return f"{count} ({', '.join(names)}{', ...' if len(rest) > NAMED else ''}){hint}"


def look(folder: Path) -> Listing:
    """List a folder and, without metadata, its subfolders; links to folders are not followed."""
    folder = folder.resolve()
    files, count, alone = list[Path](), 0, bool(Listing(folder, ()).metadata)

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
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return Listing(folder, sorted(files, key=lambda path: (path.parent != folder, path)))


def stem(path: Path) -> str:
    """A file's path without its ending."""
    return os.path.splitext(path)[0]
