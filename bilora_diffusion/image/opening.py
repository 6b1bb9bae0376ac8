"""From what ``--dataset`` names to a set of images with captions.

A folder of images alone or with a metadata file is read here, so that texts stay texts and a
missing file is named; hub ids and every other layout by ``datasets``, which keeps no copy of images
that lie in a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import mini
from ..errors import UserError, reason
from ..files import (
    folder_or_id,
    is_file,
    is_folder,
    is_text,
    quoted,
    read_rows,
    require_column,
)
from ..mini import ANIMALS, MINI
from .inputs import ANIMALS_HELDOUT, HELDOUT
from .listing import METADATA, Listing, look, stem
from .masks import ALPHA, Masks
from .masks import BESIDE as MASKS_BESIDE
from .sets import NO_CAPTIONS, ImageSet, encoded

FOLDERS = {
    MINI: mini.train_dir,
    HELDOUT: mini.heldout_dir,
    ANIMALS: mini.animals_train_dir,
    ANIMALS_HELDOUT: mini.animals_heldout_dir,
}
BESIDE = "the .txt files beside them"
TEXT = "text"
"""The column of the captions that lie beside the images."""
SPLIT = "train"
MOST_BYTES = 500_000_000
"""Of a metadata file."""
Content = dict[str, Any]
"""What an ``ImageSet`` is made of: rows, names, captions, and what is said of it."""


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
        dataset: one of ``FOLDERS``, such as "mini"; a local folder with images alone, with images
            and a ``metadata.jsonl`` or ``metadata.csv`` (column ``file_name``), or in any layout
            that ``datasets`` reads; or the id of a set on the hub. Their split "train" is taken.
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
    if caption_column == image_column:
        raise UserError(
            f'"{image_column}" can\'t be both --image_column and --caption_column: change one.'
        )
    folder = FOLDERS[dataset]() if dataset in FOLDERS else folder_or_id(dataset, "the set")
    listing = None if folder is None or config_name is not None else look(folder)
    if listing and (listing.metadata or (listing.images and not listing.tables)):
        require_column(image_column, ["image"], "--image_column", dataset)
        content = _folder(dataset, listing, caption_column, mask_column)
    else:
        columns = (image_column, caption_column, mask_column)
        content = _of_datasets(dataset, folder, listing, config_name, cache_dir, columns)
    if alpha_mask:
        content["masks"] = Masks(ALPHA, [encoded(row) for row in content["rows"]])
    return ImageSet(dataset, **content, skip_bad_images=skip_bad_images)


def _folder(label: str, listing: Listing, column: str | None, mask_column: str | None) -> Content:
    """The images that a metadata file lists, in its order; without one, by their names."""
    if len(listing.metadata) > 1:
        raise UserError(f"{label} has both {' and '.join(METADATA)}: keep one of them.")
    beside = not listing.metadata and column != NO_CAPTIONS and listing.has_captions()
    if listing.metadata:
        metadata = listing.metadata[0]
        rows = read_rows(metadata, str(metadata), most_bytes=MOST_BYTES)
        if not rows:
            raise UserError(f"{metadata} lists no image: add some.")
        files = [_file(listing.folder, row.get("file_name"), where) for where, row in rows]
    else:
        files = listing.images
        rows = [(label, {"file_name": path.name}) for path in files]
        if odd := [path.name for path in files if not is_text(path.name)]:
            raise UserError(
                f"the name {quoted(odd[0])} of an image in {label} is no text: rename it."
            )
    if beside:
        texts = listing.captions(files)
        rows = [(where, row | {TEXT: text}) for (where, row), text in zip(rows, texts, strict=True)]
        column = column or TEXT
    extra = dict.fromkeys(key for _, row in rows for key in row if key != "file_name")
    names = [str(row["file_name"]) for _, row in rows]
    found = [listing.masks.get(stem(path)) for path in files]
    masks = Masks(MASKS_BESIDE, found) if any(found) else None
    if mask_column is not None:
        require_column(mask_column, list(extra), "--mask_column", label)
        named = ((row.get(mask_column), where) for where, row in rows)
        paths = [
            _file(listing.folder, name, where, mask_column) if name else None
            for name, where in named
        ]
        masks = Masks(f'column "{mask_column}"', paths)
        del extra[mask_column]
    columns = ["image", *extra]
    return {
        "rows": [{"path": str(path)} for path in files],
        "names": names,
        "captions": _captions(
            label, names, columns, column, lambda key: [row.get(key) for _, row in rows]
        ),
        "masks": masks,
        "left_out": listing.left_out(files, captioned=beside),
        "caption_source": BESIDE if beside else None,
    }


def _file(folder: Path, name: Any, where: str, column: str = "file_name") -> Path:
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} has no "{column}" that is a name: give that of its image.')
    shown, path = quoted(name), folder / name
    if "\0" in name or not is_text(name):
        raise UserError(f"{where} names {shown}, which no file can be called: correct it.")
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


def _of_datasets(
    label: str,
    folder: Path | None,
    listing: Listing | None,
    config_name: str | None,
    cache_dir: str | None,
    chosen: tuple[str, str | None, str | None],
) -> Content:
    """The images of a split, which stay encoded until they are needed.

    Args:
        chosen: the columns of images, captions and masks.
    """
    image_column, column, mask_column = chosen
    # Else datasets may take the captions beside images in subfolders for the data.
    beside = bool(listing and listing.has_captions())
    data = _load(label, folder, config_name, cache_dir, images_only=beside)
    rows = _encoded(label, data, image_column, "--image_column")
    masks = None
    if mask_column is not None:
        sources = map(encoded, _encoded(label, data, mask_column, "--mask_column"))
        masks = Masks(f'column "{mask_column}"', list(sources))
    if not len(data):
        raise UserError(f'the split "{SPLIT}" of {label} is empty: use another set.')
    names = [f"{label}[{i}]" for i in range(len(data))]
    files, left_out, source = [], [], None
    if listing and not listing.tables:
        root = listing.folder.resolve()  # datasets made the paths absolute
        paths = [Path(row.get("path") or root) for row in rows]
        inside = [p.relative_to(root) if p.is_relative_to(root) else p for p in paths]
        files = [listing.folder / path for path in inside]
        left_out = listing.left_out(files, captioned=beside and column is None)
    if listing and beside and column is None:
        captions, source = listing.captions(files), BESIDE
    else:
        captions = _captions(
            label, names, data.column_names, column, lambda key: list(data.select_columns(key)[key])
        )
    return {
        "rows": rows,
        "names": names,
        "captions": captions,
        "masks": masks,
        "left_out": left_out,
        "caption_source": source,
    }


def _encoded(label: str, data: Any, column: str, option: str) -> Any:
    """A column of images as ``datasets`` keeps those that it does not decode."""
    import datasets

    require_column(column, data.column_names, option, label)
    if not isinstance(data.features[column], datasets.Image):
        images = [c for c, kind in data.features.items() if isinstance(kind, datasets.Image)]
        hint = f"set {option} to {' or '.join(images)}" if images else "use another set"
        raise UserError(f'column "{column}" of {label} holds no images: {hint}.')
    return data.select_columns(column).cast_column(column, datasets.Image(decode=False))[column]


def _captions(
    label: str,
    names: Sequence[str],
    columns: Sequence[str],
    column: str | None,
    values: Callable[[str], list[Any]],
) -> list[str | None]:
    """The texts of a column, one for each image; all None where no column is asked for."""
    if column is None or (column == NO_CAPTIONS and NO_CAPTIONS not in columns):
        return [None] * len(names)
    require_column(column, columns, "--caption_column", label)
    captions = values(column)
    for value, name in zip(captions, names, strict=True):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f'the caption of {name} in {label}, column "{column}", is a {type(value).__name__}'
                " and not text: set --caption_column to a column of texts."
            )
        if value and ("\0" in value or not is_text(value)):
            raise UserError(
                f"the caption of {name} in {label}, {quoted(value)}, holds a NUL or half a"
                " character (a lone surrogate): write it anew, in UTF-8."
            )
    return captions


def _load(
    label: str,
    folder: Path | None,
    config_name: str | None,
    cache_dir: str | None,
    *,
    images_only: bool,
) -> Any:
    """The split of a folder, or of a set on the hub."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError

    place = str(folder or label)
    try:
        if images_only:
            splits = datasets.load_dataset("imagefolder", data_dir=place, cache_dir=cache_dir)
        else:
            splits = datasets.load_dataset(place, config_name, cache_dir=cache_dir)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(
            f'"{label}" holds no images and nothing else that can be read: put images into it (of'
            " HEIC, `pip install pillow-heif` makes them readable)."
        ) from error
    except DatasetNotFoundError as error:
        raise UserError(
            f'the hub has no dataset "{label}" that you may read: check its name, log in with'
            " `hf auth login` if it is private or gated, or give a local folder."
        ) from error
    except (OSError, RuntimeError) as error:  # out of reach, offline, damaged, disk full
        fix = "check its files" if folder else "check the connection"
        raise UserError(
            f'the dataset "{label}" could not be loaded ({reason(error)}): {fix}, or give another'
            " folder."
        ) from error
    except (ValueError, TypeError, LookupError, DatasetsError) as error:
        raise UserError(
            f'datasets refuses "{label}" ({reason(error)}): check --dataset and'
            " --dataset_config_name."
        ) from error
    if SPLIT not in splits:
        known = ", ".join(map(str, splits))
        raise UserError(f'{label} has no split "{SPLIT}", only {known}: give a set that has it.')
    return splits[SPLIT]
