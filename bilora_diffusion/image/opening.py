"""Open a ``--dataset`` as a set of images with captions and masks.

This module reads folders of images, with or without a metadata file. The package ``datasets`` reads
hub ids and folders in other layouts. Neither copies images that are files.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.errors import UserError, as_user_error
from ..core.files import is_file, kind_of, listed, quoted, read_rows, require_column
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

TEXT = "text"  # name of the caption column if the captions are in files next to the images
NO_CAPTIONS = "none"  # value of ``--caption_column`` that ignores all captions
SPLIT = "train"
MAX_BYTES = 500_000_000  # maximum size of a metadata file, in bytes
# A function that returns an image's file or content, or None if a table row has no image.
Source = Callable[[], Path | bytes | None]


@dataclass
class Table:
    """The images and columns of an image set.

    Attributes:
        entries: the images; captions, and masks that are not in a column, are added later.
        columns: the values of each column, by name.
        files: the images' files; [] unless all images are files.
        captions_from: source of the captions if they are not in a column; otherwise None.
        masks_from: source of the masks; None if there are no masks.
        mask_files: the masks' files.
    """

    entries: list[Entry]
    columns: dict[str, Any]
    files: list[Path]
    captions_from: str | None = None
    masks_from: str | None = None
    mask_files: list[Path] = field(default_factory=list)


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
    """Open an image set. Each image is read once now for checks, and again when it is used.

    Args:
        dataset: one of `mini.FOLDERS`, such as "mini", with its `color_map` applied; a local folder
            of images, with or without a ``metadata.jsonl`` or ``metadata.csv`` (column
            ``file_name``), or in another layout that ``datasets`` reads; or a hub id. The split
            "train" is read.
        image_column: column of the images; must be "image" for a folder of images.
        caption_column: column of the captions; "none" for no captions; None for the ``.txt`` files
            next to the images of a folder without a metadata file.
        mask_column: column of the masks; None for the mask files next to the images of a folder.
        alpha_mask: use the images' alpha channels as masks.
        config_name, cache_dir: as in ``datasets.load_dataset``.
        skip_bad_images: skip unreadable images and list them in `ImageSet.skipped`.

    Raises:
        UserError: the set, a column, the split or an image is missing or unreadable.
    """
    folder = folder_of_set(dataset, "the set")
    listing = None
    if folder is not None and config_name is None:
        listing = list_folder(folder)
    if listing is not None and _is_folder_of_images(listing):
        require_column(image_column, ["image"], "--image_column", dataset)
        # The imagefolder loader of `datasets` is not used: it turns the caption "002" into 2.0 and
        # "null" into nothing, ignores missing files, lists masks as images, and takes 1.6 s to
        # import.
        table = _read_folder(dataset, listing, mask_column)
    else:
        # With caption files, use the imagefolder loader: other loaders could read them as the data.
        images_only = listing is not None and listing.has_captions
        data = _load(dataset, folder, config_name, images_only, cache_dir)
        table = _read_split(dataset, data, image_column, mask_column)

    colors = color_map(dataset)
    if colors is not None:
        for entry in table.entries:
            entry.source = partial(_recolor, entry.source, colors)
    _set_captions(dataset, table, listing, caption_column)
    _set_masks(table, mask_column, alpha_mask)
    return ImageSet(
        dataset,
        table.entries,
        remarks=_remarks(dataset, table, listing),
        masks_from=table.masks_from,
        captions_from=table.captions_from,
        skip_bad_images=skip_bad_images,
    )


def _is_folder_of_images(listing: Listing) -> bool:
    """Return whether a folder's data are images directly in it, or listed by a metadata file."""
    if listing.metadata:
        return True
    # Images next to Parquet or Arrow files are not the data; they may be a preview.
    has_tables = any(path.suffix in (".parquet", ".arrow") for path in listing.files)
    return bool(listing.images) and not has_tables


def _read_folder(label: str, listing: Listing, mask_column: str | None) -> Table:
    """Read a folder's images in the order of its metadata file, or sorted by name without one."""
    if len(listing.metadata) > 1:
        raise UserError(f"{label} has both {' and '.join(METADATA)}: keep one of them.")
    # Pairs of a row's position, for messages, and the row.
    rows = [(label, {"file_name": path.name}) for path in listing.images]
    for metadata in listing.metadata:
        rows = read_rows(metadata, str(metadata), max_bytes=MAX_BYTES)
        if not rows:
            raise UserError(f"{metadata} lists no images: add some.")

    files = [_named_file(listing.folder, place, row, "file_name") for place, row in rows]
    entries = []
    columns: dict[str, list[Any]] = {}  # without file_name
    for (place, row), file in zip(rows, files, strict=True):
        if stem_of_masked(file) is not None:
            raise UserError(
                f"{place} names {quoted(row['file_name'])}, which has the name of a mask: drop the"
                " row, or rename the file."
            )
        entries.append(Entry(str(row["file_name"]), partial(Path, file)))
        for key in row:
            if key != "file_name" and key not in columns:
                columns[key] = [other_row.get(key) for _, other_row in rows]

    if mask_column is not None:
        require_column(mask_column, columns, "--mask_column", label)
        del columns[mask_column]
    # The column of the images is "image", as in an imagefolder.
    table = Table(entries, {"image": [None] * len(rows), **columns}, files)
    if mask_column is not None:
        table.masks_from = f'column "{mask_column}"'
        for entry, (place, row) in zip(entries, rows, strict=True):
            if row.get(mask_column):
                mask_file = _named_file(listing.folder, place, row, mask_column)
                table.mask_files.append(mask_file)
                entry.mask = partial(_read_mask, partial(Path, mask_file))
    return table


def _named_file(folder: Path, place: str, row: Mapping[str, Any], column: str) -> Path:
    """Return the file that a row of a metadata file names.

    Args:
        place: position of the row, for messages.
    """
    name = row.get(column)
    if not isinstance(name, str) or not name:
        fault = "names no file"
        if name is not None:
            fault = f"has {quoted(name)}, which is not the name of a file"
        raise UserError(f'"{column}" of {place} {fault}: give the name of an image.')
    path = folder / name
    if not Path(os.path.normpath(path)).is_relative_to(folder):
        raise UserError(
            f"{place} names {quoted(name)}, which is outside the folder of the set: move it there."
        )
    if not is_file(path):
        raise UserError(
            f"{place} names {quoted(name)}, which is not a file there: add it or drop the row."
        )
    return path


def _read_split(label: str, data: Any, image_column: str, mask_column: str | None) -> Table:
    """Read the rows of a split. Their images are decoded when they are used."""
    rows = _undecoded_rows(label, data, image_column, "--image_column")
    if not len(data):
        raise UserError(f'the split "{SPLIT}" of {label} is empty: use another set.')
    image_rows: list[int] = []  # indices of the rows that are not masks
    files: list[Path] = []
    names_in_table: list[Path] = []  # file names of images whose content is in the table
    for number, row in enumerate(rows):
        path = Path(row["path"]) if row and row["path"] else None
        if path is not None and row["bytes"] is not None:
            names_in_table.append(path)
        elif path is not None and stem_of_masked(path) is None:
            files.append(path)
        elif path is not None:
            continue
        image_rows.append(number)
    if len(image_rows) < len(data):  # read again without the masks
        return _read_split(label, data.select(image_rows), image_column, mask_column)
    stems = {stem(path) for path in names_in_table}
    for path in names_in_table:
        if stem_of_masked(path) in stems:
            raise UserError(
                f"{label} has the mask {quoted(path)} among its images: put masks into their own"
                " column, and name this column with --mask_column."
            )
    entries = []
    for number in range(len(data)):
        entries.append(Entry(f"{label}[{number}]", partial(_stored_image, rows, number)))
    columns = {key: data[key] for key in data.column_names}  # read when they are used
    if len(files) < len(data):
        files = []
    table = Table(entries, columns, files)
    if mask_column:
        table.masks_from = f'column "{mask_column}"'
        masks = _undecoded_rows(label, data, mask_column, "--mask_column")
        for number, entry in enumerate(entries):
            entry.mask = partial(_read_mask, partial(_stored_image, masks, number))
    return table


def _undecoded_rows(label: str, data: Any, column: str, option: str) -> Any:
    """Return a column of undecoded images: mappings with "bytes" and "path", or None."""
    import datasets

    image_columns = []
    for name, kind in data.features.items():
        if isinstance(kind, datasets.Image):
            image_columns.append(name)
    if not image_columns:
        raise _without_images(label, f", only columns ({listed(data.column_names)})")
    require_column(column, data.column_names, option, label)
    if column not in image_columns:
        raise UserError(
            f'column "{column}" of {label} holds no images: set {option} to'
            f" {' or '.join(image_columns)}."
        )
    return data.select_columns(column).cast_column(column, datasets.Image(decode=False))[column]


def _stored_image(rows: Sequence[Mapping[str, Any] | None], number: int) -> Path | bytes | None:
    """Return the content or the file of an image in a table; None if the row has no image."""
    stored = rows[number] or {}
    if stored.get("bytes") is not None:
        return stored["bytes"]
    if stored.get("path") is not None:
        return Path(stored["path"])
    return None


def _recolor(source: Source, colors: str) -> bytes | None:
    """Map the colors of an image file (`mini.color_map`) and return its new content."""
    encoded = source()
    if encoded is None:
        return None
    # Not compressed, so that the hash is the same with every version of Pillow and zlib.
    content = BytesIO()
    MAPS[colors](read_rgb(encoded)).save(content, "PPM")
    return content.getvalue()


def _read_mask(source: Source, alpha: bool = False) -> Image.Image | None:
    encoded = source()
    if encoded is None:
        return None
    return read_mask(encoded, alpha=alpha)


def _set_captions(label: str, table: Table, listing: Listing | None, column: str | None) -> None:
    """Set the images' captions to the texts of a column; blank texts are not captions.

    If the set has no column `TEXT`, this name selects the ``.txt`` files next to the images.

    Args:
        label: name of the set in messages.
        listing: files of the folder; None for other sets.
        column: ``--caption_column``; None for the files next to the images, if there are any.
    """
    # If there is a metadata file, all captions are in its columns.
    if listing and listing.has_captions and table.files and not listing.metadata:
        if column is None or (column == TEXT and TEXT not in table.columns):
            column = TEXT
            table.columns[TEXT] = listing.captions(table.files)
            table.captions_from = "the .txt files next to them"
        else:
            table.columns.setdefault(TEXT, [])  # for messages, which list the columns
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


def _set_masks(table: Table, mask_column: str | None, alpha_mask: bool) -> None:
    """Set masks that are not in a column: alpha channels of the images, or mask files."""
    if alpha_mask:
        table.masks_from = "their alpha channel"
        for entry in table.entries:
            entry.mask = partial(_read_mask, entry.source, alpha=True)
        return
    if mask_column is not None:
        return
    masks = masks_beside(table.files)
    if masks:
        table.masks_from = "the .mask files next to them"
        table.mask_files = list(masks.values())
        for entry, file in zip(table.entries, table.files, strict=True):
            if file in masks:
                entry.mask = partial(_read_mask, partial(Path, masks[file]))


def _remarks(label: str, table: Table, listing: Listing | None) -> list[str]:
    """Return notes for the user on folder names and files that are not read."""
    remarks = []
    if name := unread_folder_name(table.files):
        remarks.append(
            f"names of folders, such as {quoted(name)}, are not read as repeats or as a prompt:"
            " give --repeats and --instance_prompt, or a list of concepts (docs/data.md)"
        )
    if listing and table.files:
        captioned = table.captions_from is not None
        if left_out := listing.left_out(table.files, table.mask_files, captioned=captioned):
            remarks.append(f"left out of {label}: {left_out}")
    return remarks


def _load(
    label: str, folder: Path | None, config_name: str | None, images_only: bool, cache: str | None
) -> Any:
    """Load the split "train" of a folder, or of a set on the hub.

    Args:
        images_only: use the imagefolder loader, even if the folder has other files.
        cache: folder for downloads.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    place = str(folder.resolve() if folder else label)
    if folder and glob.has_magic(place):
        # With an escaped pattern, `datasets` would walk through all folders next to this one, which
        # can take minutes.
        raise UserError(
            f'the path "{place}" has "*", "?" or "[", which the package datasets reads as a'
            " pattern: rename the folder, or put its images directly into it."
        )
    with as_user_error(
        f'the dataset "{label}" can\'t be loaded',
        "check its name and files, the connection and --dataset_config_name",
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
        raise UserError(f'{label} has no split "{SPLIT}", only {names}: give a set with it.')
    return splits[SPLIT]


def _without_images(label: str, content: str = "") -> UserError:
    """Return the error for a set without images; ``content`` names what the set has instead."""
    return UserError(
        f'"{label}" holds no images{content}: add images to it, or give another set'
        " (`pip install pillow-heif` makes HEIC readable)."
    )
