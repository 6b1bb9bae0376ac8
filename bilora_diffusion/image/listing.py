"""What lies in a folder that is given as a set of images, and what of it no one would read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from ..files import is_file, quoted, read_text
from .decode import HEIF_SUFFIXES, image_suffixes

MOST_ENTRIES = 200_000
"""Files and folders below a set of images; more are the root of a disk, or somebody's home."""

MOST_CAPTION_BYTES = 100_000
MASK = ".mask"
"""What the name of a mask ends in, before .png."""
METADATA = ("metadata.jsonl", "metadata.csv")
TABLES = frozenset((".parquet", ".arrow"))
PACKED = frozenset((".csv", ".gz", ".json", ".jsonl", ".tar", ".zip"))
RAW = frozenset((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"))
PHOTOS = {
    "HEIC file{s}, which `pip install pillow-heif` makes readable": HEIF_SUFFIXES,
    "raw photo{s}, which must be exported as JPEG or PNG": RAW,
}
UNLISTED = "image{s} that the metadata does not list"
NAMED_ELSEWHERE = ""
NAMED = 3


@dataclass(frozen=True)
class Listing:
    """The files of a folder, hidden ones left out.

    Attributes:
        folder: where they lie.
        files: those directly in it, sorted by name.
        deeper: those in its subfolders.
        whole: False if a set with a metadata file holds more than ``MOST_ENTRIES``.
    """

    folder: Path
    files: tuple[Path, ...]
    deeper: tuple[Path, ...]
    whole: bool = True

    @cached_property
    def metadata(self) -> list[Path]:
        """The metadata files in it."""
        return [path for path in self.files if path.name in METADATA and is_file(path)]

    @cached_property
    def images(self) -> list[Path]:
        """The images directly in it, without the masks that lie beside them."""
        suffixes = image_suffixes()
        found = [p for p in self.files if p.suffix.lower() in suffixes and is_file(p)]
        return [path for path in found if not self.is_mask(path)]

    @cached_property
    def deeper_images(self) -> list[Path]:
        """The images in its subfolders."""
        suffixes = image_suffixes()
        return [path for path in self.deeper if path.suffix.lower() in suffixes]

    @property
    def is_plain(self) -> bool:
        """Whether it is a folder of images: with a metadata file, or images alone.

        Images beside Parquet or Arrow files are no data (a preview, say): the tables are.
        """
        tables = any(path.suffix in TABLES for path in (*self.files, *self.deeper))
        return bool(self.metadata) or (not tables and bool(self.images))

    def masks(self, images: Sequence[Path]) -> list[Path | None]:
        """The mask beside each image; None where there is none."""
        return [self._masks.get(_stem(image)) for image in images]

    def is_mask(self, path: Path) -> bool:
        """Whether a file is the mask of an image beside it, as name.mask.png is of name.jpg."""
        return path in self._masks.values()

    @property
    def is_unreadable(self) -> bool:
        """Whether it holds photos that can't be read, and nothing else that holds images."""
        every = {path.suffix.lower() for path in (*self.files, *self.deeper)}
        return bool(self.unreadable()) and not every & (image_suffixes() | TABLES | PACKED)

    def captions(self, images: Sequence[Path]) -> list[str | None]:
        """The text of the ``.txt`` file beside each image; None where there is none.

        Its lines are joined: a caption is one text.

        Raises:
            UserError: a caption is no UTF-8 text, or far too long.
        """
        files = [self._texts.get(_stem(image)) for image in images]
        return [path and _caption(path, self.folder) for path in files]

    def has_captions(self) -> bool:
        """Whether a ``.txt`` file lies beside an image."""
        return any(_stem(path) in self._texts for path in (*self.images, *self.deeper_images))

    def left_out(self, used: Sequence[Path], *, captioned: bool) -> list[str]:
        """What is not read, in a few words a kind.

        Args:
            used: the images that are.
            captioned: whether the ``.txt`` files beside them are read too.
        """
        if not self.whole:
            return []
        taken = set(used)
        stems = {_stem(path) for path in taken}
        kinds: dict[str, list[Path]] = {}
        for path in self.files:
            if path not in taken and path.name not in METADATA and not self.is_mask(path):
                kinds.setdefault(_kind(path, stems, captioned), []).append(path)
        below = [path for path in self.deeper_images if path not in taken]
        if self.metadata:
            kinds.setdefault(UNLISTED, []).extend(below)
        else:
            folders = {self.folder / path.relative_to(self.folder).parts[0] for path in below}
            kinds["subfolder{s} with images"] = sorted(folders)
        kinds.pop(NAMED_ELSEWHERE, None)
        return self.unreadable() + _counted(kinds)

    def unreadable(self) -> list[str]:
        """Photos, here and in subfolders, of kinds that can't be read, in a few words a kind."""
        every, readable = (*self.files, *self.deeper), image_suffixes()
        return _counted(
            {
                kind: [path for path in every if path.suffix.lower() in suffixes - readable]
                for kind, suffixes in PHOTOS.items()
            }
        )

    @cached_property
    def _masks(self) -> dict[str, Path]:
        suffixes = image_suffixes()
        found = {
            _stem(path).removesuffix(MASK): path
            for path in self.files
            if path.suffix.lower() == ".png" and _stem(path).endswith(MASK)
        }
        pictures = {_stem(path) for path in self.files if path.suffix.lower() in suffixes}
        return {stem: path for stem, path in found.items() if stem in pictures}

    @cached_property
    def _texts(self) -> dict[str, Path]:
        every = (*self.files, *self.deeper)
        return {_stem(path): path for path in every if path.suffix.lower() == ".txt"}


def look(folder: Path) -> Listing:
    """List a folder and its subfolders; links to folders are not followed.

    Raises:
        UserError: it may not be read, or holds more than a set of images would.
    """
    listed = any(is_file(folder / name) for name in METADATA)
    files: list[Path] = []
    deeper: list[Path] = []
    count = 0
    for place, folders, names in os.walk(folder, onerror=lambda error: _refuse(folder, error)):
        count += len(folders) + len(names)
        if count > MOST_ENTRIES and listed:
            return Listing(folder, tuple(sorted(files)), (), whole=False)
        if count > MOST_ENTRIES:
            raise UserError(
                f'"{folder}" holds more than {MOST_ENTRIES:,} files and folders, which is hardly a'
                " set of images: give the folder of the images alone, or put a metadata.jsonl that"
                " lists them into it."
            )
        names += [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        (files if Path(place) == folder else deeper).extend(paths)
    return Listing(folder, tuple(sorted(files)), tuple(sorted(deeper)))


def _refuse(folder: Path, error: OSError) -> None:
    if Path(error.filename) == folder:
        raise UserError(
            f'"{folder}" can\'t be read ({error.strerror}): change its permissions.'
        ) from error


def _kind(path: Path, stems: Set[str], captioned: bool) -> str:
    """What is left out with a file beside images that have these names without endings."""
    suffix = path.suffix.lower()
    if suffix in image_suffixes():
        return UNLISTED if is_file(path) else "image{s} that can't be opened"
    if any(suffix in kinds for kinds in PHOTOS.values()):
        return NAMED_ELSEWHERE
    if suffix in (".caption", ".captions"):
        return f"{suffix} file{{s}}, which must end in .txt"
    if suffix != ".txt":
        return "other file{s}"
    if _stem(path) not in stems:
        return "text{s} without an image"
    return NAMED_ELSEWHERE if captioned else "caption{s} in .txt files"


def _stem(path: Path) -> str:
    return os.path.splitext(os.path.abspath(path))[0]


def _caption(path: Path, folder: Path) -> str:
    name = str(path.relative_to(folder))
    return " ".join(read_text(path, f"the caption {name}", MOST_CAPTION_BYTES).split())


def _counted(kinds: Mapping[str, Sequence[Path]]) -> list[str]:
    return [
        f"{len(paths)} {kind.format(s='' if len(paths) == 1 else 's')} ({_names(paths)})"
        for kind, paths in kinds.items()
        if paths
    ]


def _names(paths: Sequence[Path]) -> str:
    shown = [quoted(path.name).strip('"') for path in paths[:NAMED]]
    return ", ".join([*shown, *(["..."] if len(paths) > NAMED else [])])
