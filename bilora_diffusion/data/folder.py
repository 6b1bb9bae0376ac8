"""A local folder of images, alone or with a metadata file beside them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .decode import IMAGE_SUFFIXES
from .sources import ImageSet, require_column, require_texts

METADATA = ("metadata.jsonl", "metadata.csv")


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
        cls, label: str, folder: Path, image_column: str, caption_column: str | None
    ) -> FolderImages:
        """Read a folder. With a metadata file, the images are those it lists, in its order.

        Raises:
            UserError: a column is missing, a row is malformed or names a file that is not there.
        """
        found = [folder / name for name in METADATA if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{label} has both {' and '.join(METADATA)}: keep one of them.")
        rows = _rows(found[0]) if found else [{"file_name": f.name} for f in image_files(folder)]
        if not rows:
            raise UserError(f"{found[0] if found else label} lists no image: add some.")
        files = [_file(folder, row, number, found) for number, row in enumerate(rows, start=1)]
        extra = [key for key in dict.fromkeys(k for row in rows for k in row) if key != "file_name"]
        columns = ["image", *extra]
        require_column(image_column, ["image"], "--image_column", label)
        names = [str(row["file_name"]) for row in rows]
        captions: list[Any] = [None] * len(rows)
        if caption_column is not None:
            require_column(caption_column, columns, "--caption_column", label)
            captions = [row.get(caption_column) for row in rows]
            require_texts(captions, names, caption_column, label)
        return cls(label, files, names, captions, columns)


def has_own_images(folder: Path) -> bool:
    """Whether ``folder`` is a plain folder of images: with a metadata file, or images alone.

    Images beside Parquet or Arrow files are no data (a preview, say): the tables are.
    """
    if any((folder / name).is_file() for name in METADATA):
        return True
    tables = any(path.suffix in (".parquet", ".arrow") for path in folder.rglob("*"))
    return not tables and bool(image_files(folder))


def image_files(folder: Path) -> list[Path]:
    """The images directly in ``folder``, hidden files left out, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text ({error}): save it anew.") from error
    if path.suffix == ".csv":
        return list(_csv_rows(path, text))
    return list(_json_rows(path, text))


def _csv_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        if None in row or None in row.values():
            raise UserError(
                f"line {reader.line_num} of {path} does not have {len(reader.fieldnames or ())}"
                " fields as its header has: quote fields that contain a comma."
            )
        yield row


def _json_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error.msg}): write one object a line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} of {path} is not a JSON object: write one object a line."
            )
        yield row


def _file(folder: Path, row: dict[str, Any], number: int, found: Sequence[Path]) -> Path:
    where = f"row {number} of {found[0]}" if found else str(folder)
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} has no "file_name": name the image that it describes.')
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f'{where} names "{name}" outside of its folder: move the image into it.')
    if not path.is_file():
        raise UserError(
            f'{where} names "{name}", which is not there: add the file or drop the row.'
        )
    return path
