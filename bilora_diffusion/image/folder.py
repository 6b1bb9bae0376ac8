"""A local folder of images, alone or with a metadata file beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import is_file, is_folder, is_text, quoted, read_rows
from .listing import METADATA, Listing
from .sources import NO_CAPTIONS, ImageSet, require_column, require_texts

TEXT = "text"
"""The column of the captions that lie beside the images."""
MOST_BYTES = 500_000_000


class FolderImages(ImageSet):
    """The images of a folder; made by ``open``."""

    def __init__(
        self,
        label: str,
        files: Sequence[Path],
        names: Sequence[str],
        captions: Sequence[str | None],
        columns: Sequence[str],
    ) -> None:
        super().__init__(label, names, captions, columns)
        self._files = list(files)

    def _source(self, row: int) -> Path:
        return self._files[row]

    @classmethod
    def open(
        cls, label: str, listing: Listing, image_column: str, caption_column: str | None
    ) -> FolderImages:
        """Read a folder. With a metadata file, the images are those it lists, in its order, and
        their captions are in its columns; without, the captions are the ``.txt`` files beside them.

        Raises:
            UserError: a column is missing, a row is malformed or names a file that is not there, or
                a caption is no text.
        """
        require_column(image_column, ["image"], "--image_column", label)
        beside = not listing.metadata and caption_column != NO_CAPTIONS and listing.has_captions()
        if listing.metadata:
            images = cls(label, *_listed(label, listing, caption_column))
        else:
            images = cls(label, *_alone(label, listing, caption_column, beside))
        images.left_out = tuple(listing.left_out(images._files, captioned=beside))
        if beside:
            images.caption_source = "the .txt files beside them"
        return images


Content = tuple[list[Path], list[str], list[Any], list[str]]
"""Files, names and captions, one per image, and the columns of the set."""


def _alone(label: str, listing: Listing, column: str | None, beside: bool) -> Content:
    files, columns = listing.images, ["image", TEXT] if beside else ["image"]
    if column not in (None, NO_CAPTIONS):
        require_column(column, columns, "--caption_column", label)
    names = [path.name for path in files]
    for name in names:
        if not is_text(name):
            raise UserError(
                f"the name {quoted(name)} of an image in {label} is no text: rename it."
            )
    captions = listing.captions(files) if beside else [None] * len(files)
    return files, names, captions, columns


def _listed(label: str, listing: Listing, column: str | None) -> Content:
    if len(listing.metadata) > 1:
        raise UserError(f"{label} has both {' and '.join(METADATA)}: keep one of them.")
    metadata = listing.metadata[0]
    rows = read_rows(metadata, str(metadata), most_bytes=MOST_BYTES)
    if not rows:
        raise UserError(f"{metadata} lists no image: add some.")
    files = [_file(listing.folder, row, where) for where, row in rows]
    extra = dict.fromkeys(key for _, row in rows for key in row)
    columns = ["image", *(key for key in extra if key != "file_name")]
    names = [str(row["file_name"]) for _, row in rows]
    captions: list[Any] = [None] * len(rows)
    if column is not None and (column != NO_CAPTIONS or column in columns):
        require_column(column, columns, "--caption_column", label)
        captions = [row.get(column) for _, row in rows]
        require_texts(captions, names, column, label)
    return files, names, captions, columns


def _file(folder: Path, row: dict[str, Any], where: str) -> Path:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} has no "file_name": name the image that it describes.')
    shown = quoted(name)
    if "\0" in name or not is_text(name):
        raise UserError(f"{where} names {shown}, which no file can be called: correct it.")
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle, or a name that is too long
        inside = True
    if not inside:
        raise UserError(f"{where} names {shown} outside of its folder: move the image into it.")
    if is_folder(path):
        raise UserError(f"{where} names {shown}, which is a folder: name each of its images.")
    if not is_file(path):
        raise UserError(f"{where} names {shown}, which is not there: add the file or drop the row.")
    return path
