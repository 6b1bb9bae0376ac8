"""From what ``--dataset`` names to a set of images with captions.

A folder of images alone or with a metadata file is read here; hub ids and every other layout are
read by ``datasets``, which keeps no copy of images that lie in a folder.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..core.errors import UserError, translated
from ..core.files import (
    is_file,
    kind_of,
    listed,
    quoted,
    read_rows,
    require_column,
)
from ..mini import color_map
from ..mini.colors import MAPS
from .image_files import (
    METADATA,
    Listing,
    folder_of_set,
    list_folder,
    masks_beside,
    read_mask,
    read_rgb,
    stem,
    stem_of_masked,
    unread_folder_name,
)
from .sets import Entry, ImageSet

CAPTION_FILES = "the .txt files beside them"
MASK_FILES = "the .mask files beside them"
TEXT = "text"
"""The column of the captions that lie beside the images."""
NO_CAPTIONS = "none"
"""The ``--caption_column`` of one who wants no captions, wherever they lie."""
SPLIT = "train"
MAX_BYTES = 500_000_000
"""Largest metadata file."""
Source = Callable[[], Path | bytes | None]


class Table(NamedTuple):
    """A set as it is stored."""

    entries: list[Entry]  # its images, without captions
    columns: dict[str, Any]  # the values of each column
    files: list[Path]  # of the images, where each is a file
    masks_from: str | None  # the column of the masks
    mask_files: list[Path]  # that a metadata file names


def open_images(
    dataset: str,
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    mask_column: str | None = None,
    alpha_mask: bool = False,
    config_name: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
) -> ImageSet:
    """Open a set of images; each is looked at once here and read again when needed.

    Args:
        dataset: one of ``mini.FOLDERS``, such as "mini", seen through its `color_map`; a local
            folder with images alone, with images and a ``metadata.jsonl`` or ``metadata.csv``
            (column ``file_name``), or in any layout that ``datasets`` reads; or the id of a set on
            the hub. Their split "train" is taken.
        image_column: where the images are; a folder's own images are in column "image".
        caption_column: where their captions are; "none" to have none; None for those of the
            ``.txt`` files beside the images of a folder without metadata.
        mask_column: where masks are; None for those that lie beside the images of a folder.
        alpha_mask: the images' own opacity is their mask.
        config_name, cache_dir: as for ``datasets.load_dataset``.
        skip_bad_images: leave unreadable images out and list them in ``skipped``.

    Raises:
        UserError: no such set, column, split or image; the message names it and the fix.
    """
    folder = folder_of_set(dataset, "the set")
    listing = None if folder is None or config_name is not None else list_folder(folder)
    captioned = listing is not None and listing.has_captions
    # Images beside Parquet or Arrow are no data (a preview, say).
    stored = listing and any(path.suffix in (".parquet", ".arrow") for path in listing.files)
    if listing and (listing.metadata or (listing.images and not stored)):
        require_column(image_column, ["image"], "--image_column", dataset)
        # Not by imagefolder of `datasets`: it makes 2.0 of the caption "002" and nothing of
        # "null", does not miss a file that is not there, lists masks as images, and takes 1.6 s
        # to import.
        table = _read_folder(dataset, listing, mask_column)
    else:
        # imagefolder, where captions lie beside images: else they may be taken for the data.
        data = _load(dataset, folder, config_name, captioned, cache_dir)
        table = _read_split(dataset, data, image_column, mask_column)

    if (colors := color_map(dataset)) is not None:
        for entry in table.entries:
            entry.source = partial(_recolored, entry.source, colors)

    # Captions: of a column, or of the files beside the images.
    reads_caption_files = False
    has_no_column = caption_column is None or TEXT not in table.columns
    if listing and captioned and has_no_column and table.files and not listing.metadata:
        caption_column = caption_column or TEXT
        reads_caption_files = caption_column == TEXT
        table.columns[TEXT] = listing.captions(table.files) if reads_caption_files else []
    _set_captions(dataset, table, caption_column)

    # Masks: the images' own opacity, or the files beside them; those of a column are set already.
    masks = dict[Path, Path]()
    masks_from = table.masks_from
    if alpha_mask:
        masks_from = "their alpha channel"
        for entry in table.entries:
            entry.mask = partial(_mask, entry.source, True)
    elif mask_column is None and (masks := masks_beside(table.files)):
        masks_from = MASK_FILES
        for entry, file in zip(table.entries, table.files, strict=True):
            if file in masks:
                entry.mask = partial(_mask, partial(Path, masks[file]))

    # What should be known of how they were found.
    remarks = []
    if name := unread_folder_name(table.files):
        remarks.append(
            f"names of folders, such as {quoted(name)}, are not read, neither as repeats nor as a"
            " prompt: give --repeats and --instance_prompt, or a list of concepts (docs/data.md)"
        )
    if listing and table.files:
        used_masks = [*masks.values(), *table.mask_files]
        if left_out := listing.left_out(table.files, used_masks, captioned=reads_caption_files):
            remarks.append(f"left out of {dataset}: {left_out}")
    return ImageSet(
        dataset,
        table.entries,
        remarks=remarks,
        masks_from=masks_from,
        captions_from=CAPTION_FILES if reads_caption_files else None,
        skip_bad_images=skip_bad_images,
    )


def _read_folder(label: str, listing: Listing, mask_column: str | None) -> Table:
    """The images that a metadata file lists, in its order; without one, by their names."""
    if len(listing.metadata) > 1:
        raise UserError(f"{label} has both {' and '.join(METADATA)}: keep one of them.")
    rows = [(label, {"file_name": path.name}) for path in listing.images]
    for metadata in listing.metadata:
        if not (rows := read_rows(metadata, str(metadata), most_bytes=MAX_BYTES)):
            raise UserError(f"{metadata} lists no image: add some.")
    files = [_file(listing.folder, where, row, "file_name") for where, row in rows]
    for (where, row), file in zip(rows, files, strict=True):
        if stem_of_masked(file) is not None:
            raise UserError(
                f"{where} names {quoted(row['file_name'])}, a mask by its name: drop the row, or"
                " rename the file."
            )
    columns: dict[str, list[Any]] = {}  # but for file_name
    keys = dict.fromkeys(itertools.chain(*(row for _, row in rows)))
    for key in keys:
        if key != "file_name":
            columns[key] = [row.get(key) for _, row in rows]
    entries, mask_files = [], list[Path]()
    for (_, row), file in zip(rows, files, strict=True):
        entries.append(Entry(str(row["file_name"]), partial(Path, file)))
    masks_from = None
    if mask_column is not None:
        require_column(mask_column, columns, "--mask_column", label)
        del columns[mask_column]
        masks_from = f'column "{mask_column}"'
        for entry, (where, row) in zip(entries, rows, strict=True):
            if row.get(mask_column):
                mask_files.append(_file(listing.folder, where, row, mask_column))
                entry.mask = partial(_mask, partial(Path, mask_files[-1]))
    # The images themselves are in the column "image", as imagefolder calls it.
    columns = {"image": [None] * len(rows), **columns}
    return Table(entries, columns, files, masks_from, mask_files)


def _file(folder: Path, where: str, row: Mapping[str, Any], column: str) -> Path:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        fault = "names no file"
        if name is not None:
            fault = f"names {quoted(name)}, which no file is called"
        raise UserError(f'"{column}" of {where} {fault}: give the name of an image.')
    path = folder / name
    if not Path(os.path.normpath(path)).is_relative_to(folder):
        raise UserError(
            f"{where} names {quoted(name)} outside of its folder: move the image into it."
        )
    if not is_file(path):
        raise UserError(
            f"{where} names {quoted(name)}, which is not a file there: add it or drop the row."
        )
    return path


def _read_split(label: str, data: Any, image_column: str, mask_column: str | None) -> Table:
    """The images of a split, which stay encoded until they are needed."""
    rows = _undecoded(label, data, image_column, "--image_column")
    if not len(data):
        raise UserError(f'the split "{SPLIT}" of {label} is empty: use another set.')
    pictures = list[int]()  # rows that are no masks
    files = list[Path]()
    names_in_table = list[Path]()  # of images whose content is in the table
    for number, row in enumerate(rows):
        path = Path(row["path"]) if row and row["path"] else None
        if path is None:
            pictures.append(number)
        elif row["bytes"] is not None:
            pictures.append(number)
            names_in_table.append(path)
        elif stem_of_masked(path) is None:
            pictures.append(number)
            files.append(path)
    if len(pictures) < len(data):
        return _read_split(label, data.select(pictures), image_column, mask_column)
    stems = {stem(path) for path in names_in_table}
    for path in names_in_table:
        if stem_of_masked(path) in stems:
            raise UserError(
                f"{label} has the mask {quoted(path)} among its images: put masks into a column of"
                " their own, and name it by --mask_column."
            )
    masks = _undecoded(label, data, mask_column, "--mask_column") if mask_column else None
    entries = [
        Entry(
            f"{label}[{i}]",
            partial(_stored, rows, i),
            mask=masks and partial(_mask, partial(_stored, masks, i)),
        )
        for i in range(len(data))
    ]
    return Table(
        entries,
        {key: data[key] for key in data.column_names},  # read when they are needed
        files if len(files) == len(data) else [],
        f'column "{mask_column}"' if masks else None,
        [],
    )


def _undecoded(label: str, data: Any, column: str, option: str) -> Any:
    """A column of images that ``datasets`` does not decode."""
    import datasets

    images = [c for c, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise _without_images(label, f", only columns ({listed(data.column_names)})")
    require_column(column, data.column_names, option, label)
    if column not in images:
        raise UserError(
            f'column "{column}" of {label} holds no images: set {option} to {" or ".join(images)}.'
        )
    return data.select_columns(column).cast_column(column, datasets.Image(decode=False))[column]


def _stored(rows: Sequence[Mapping[str, Any] | None], number: int) -> Path | bytes | None:
    stored = rows[number] or {}
    if stored.get("bytes") is not None:
        return stored["bytes"]
    return None if stored.get("path") is None else Path(stored["path"])


def _recolored(source: Source, colors: str) -> bytes | None:
    """The content of a file with a picture in other colours."""
    if (encoded := source()) is None:
        return None
    # Uncompressed, so that its hash is the same with every version of Pillow and zlib.
    content = BytesIO()
    MAPS[colors](read_rgb(encoded)).save(content, "PPM")
    return content.getvalue()


def _mask(source: Source, alpha: bool = False) -> Image.Image | None:
    encoded = source()
    return None if encoded is None else read_mask(encoded, alpha=alpha)


def _set_captions(label: str, table: Table, column: str | None) -> None:
    """Give the images the texts of a column that are more than blank, if one is asked for."""
    if column is None or (column == NO_CAPTIONS and NO_CAPTIONS not in table.columns):
        return
    require_column(column, table.columns, "--caption_column", label)
    for entry, value in zip(table.entries, table.columns[column], strict=True):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f'the caption of {entry.name} in {label}, column "{column}", is {kind_of(value)}'
                f" ({quoted(value)}), not a text: set --caption_column to a column of texts."
            )
        entry.caption = value if value and value.strip() else None


def _load(
    label: str, folder: Path | None, config_name: str | None, images_only: bool, cache: str | None
) -> Any:
    """The split of a folder, or of a set on the hub."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    place = str(folder.resolve() if folder else label)
    if folder and glob.has_magic(place):
        # Escaped, it would be read after a walk through all that lies beside it, which takes
        # minutes in a large folder.
        raise UserError(
            f'the path "{place}" has "*", "?" or "[", which the package datasets takes for a'
            " pattern: rename the folder, or put its images directly into it."
        )
    with translated(
        f'the dataset "{label}" can\'t be loaded',
        "check its files or the connection, --dataset and --dataset_config_name",
    ):
        try:
            if images_only:
                splits = datasets.load_dataset("imagefolder", data_dir=place, cache_dir=cache)
            else:
                splits = datasets.load_dataset(place, config_name, cache_dir=cache)
        except (DataFilesNotFoundError, EmptyDatasetError) as error:
            raise _without_images(label) from error
        except DatasetNotFoundError as error:
            raise UserError(
                f'the hub has no dataset "{label}" that you may read: check its name, log in with'
                " `hf auth login` if it is private or gated, or give a local folder."
            ) from error
    if SPLIT not in splits:
        names = ", ".join(map(str, splits))
        raise UserError(f'{label} has no split "{SPLIT}", only {names}: give a set that has it.')
    return splits[SPLIT]


def _without_images(label: str, content: str = "") -> UserError:
    return UserError(
        f'"{label}" holds no images{content}: put some into it, or give another set'
        " (`pip install pillow-heif` makes HEIC readable)."
    )
