"""A set that the ``datasets`` library reads: a hub id, or a local folder in one of its layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .listing import Listing
from .sources import NO_CAPTIONS, ImageSet, reason, require_column, require_texts


class HubImages(ImageSet):
    """The images of one split of a set; made by ``open``."""

    def __init__(
        self,
        label: str,
        rows: Any,
        names: Sequence[str],
        captions: Sequence[str | None],
        columns: Sequence[str],
    ) -> None:
        super().__init__(label, names, captions, columns)
        self._rows = rows

    def _source(self, row: int) -> Path | bytes:
        stored = self._rows[row] or {}
        if stored.get("bytes") is not None:
            return stored["bytes"]
        if stored.get("path") is None:
            raise ValueError("the row holds no image")
        return Path(stored["path"])

    @classmethod
    def open(
        cls,
        label: str,
        location: str | Listing,
        *,
        image_column: str,
        caption_column: str | None,
        config_name: str | None,
        cache_dir: str | None,
        split: str,
    ) -> HubImages:
        """Load a split and look up its columns; images stay encoded until they are needed.

        Args:
            label: what the user called the set.
            location: what ``datasets.load_dataset`` is given: a folder, listed, or a hub id.

        Raises:
            UserError: no such set, configuration, split or column, or the hub is out of reach.
        """
        import datasets

        # Else datasets may take the captions beside images in subfolders for the data.
        beside = isinstance(location, Listing) and config_name is None and location.has_captions()
        data = _load(label, location, config_name, cache_dir, split, images_only=beside)
        columns = data.column_names
        require_column(image_column, columns, "--image_column", label)
        if not isinstance(data.features[image_column], datasets.Image):
            images = [c for c in columns if isinstance(data.features[c], datasets.Image)]
            hint = f"set --image_column to {' or '.join(images)}" if images else "use another set"
            raise UserError(f'column "{image_column}" of {label} holds no images: {hint}.')
        if not len(data):
            raise UserError(f'the split "{split}" of {label} is empty: use another set.')
        rows = data.select_columns(image_column).cast_column(
            image_column, datasets.Image(decode=False)
        )[image_column]
        names = [f"{label}[{i}]" for i in range(len(data))]
        captions: list[Any] = [None] * len(data)
        if caption_column is not None and (caption_column != NO_CAPTIONS or NO_CAPTIONS in columns):
            require_column(caption_column, columns, "--caption_column", label)
            captions = list(data.select_columns(caption_column)[caption_column])
            require_texts(captions, names, caption_column, label)
        elif caption_column is None and beside and isinstance(location, Listing):
            captions = _captions(location, [row.get("path") for row in rows])
        images = cls(label, rows, names, captions, columns)
        if isinstance(location, Listing):
            images.left_out = tuple(location.unreadable())
        if caption_column is None and beside:
            images.caption_source = "the .txt files beside them"
        return images


def _captions(listing: Listing, files: Sequence[str | None]) -> list[str | None]:
    """The texts beside the files, whose paths ``datasets`` has made absolute."""
    root = listing.folder.resolve()
    paths = [Path(file or root) for file in files]
    inside = [p.relative_to(root) if p.is_relative_to(root) else p for p in paths]
    return listing.captions([listing.folder / path for path in inside])


def _load(
    label: str,
    location: str | Listing,
    config_name: str | None,
    cache_dir: str | None,
    split: str,
    *,
    images_only: bool,
) -> Any:
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError

    local = isinstance(location, Listing)
    place = str(location.folder) if isinstance(location, Listing) else location
    try:
        if images_only:
            splits = datasets.load_dataset("imagefolder", data_dir=place, cache_dir=cache_dir)
        else:
            splits = datasets.load_dataset(place, config_name, cache_dir=cache_dir)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(
            f'"{label}" holds no images and nothing else that can be read: put images into it.'
        ) from error
    except DatasetNotFoundError as error:
        raise UserError(
            f'the hub has no dataset "{label}" that you may read: check its name, log in with'
            " `hf auth login` if it is private or gated, or give a local folder."
        ) from error
    except (OSError, RuntimeError) as error:  # out of reach, offline, damaged, disk full
        fix = "check its files" if local else "check the connection"
        raise UserError(
            f'the dataset "{label}" could not be loaded ({reason(error)}): {fix}, or give another'
            " folder."
        ) from error
    except (ValueError, TypeError, LookupError, DatasetsError) as error:
        raise UserError(
            f'datasets refuses "{label}" ({reason(error)}): check --dataset and'
            " --dataset_config_name."
        ) from error
    if split not in splits:
        known = ", ".join(map(str, splits))
        raise UserError(f'{label} has no split "{split}", only {known}: give a set that has it.')
    return splits[split]
