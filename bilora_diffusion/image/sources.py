"""Images with their captions, from the miniature, a local folder or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .. import mini
from ..errors import UserError
from ..files import is_file, is_folder, is_text, quoted
from .decode import DECODE_ERRORS, read_rgb, upright_size

FULL_CHECK_LIMIT = 2000
"""Up to this many images are decoded whole when opened; of more, only the headers are read."""

MOST_ELONGATED = 64
"""Times a side may be longer than the other: resizing makes of it what memory can't hold."""

NO_CAPTIONS = "none"
"""The ``--caption_column`` of one who wants no captions, wherever they lie."""

BUILT_IN = {"mini": mini.train_dir, "mini-heldout": mini.heldout_dir}


class ImageSet(ABC):
    """Images that are read when needed, each with the caption that belongs to it.

    Args:
        label: what to call the set in messages (the ``--dataset`` value).
        names: one per image, for messages and logs.
        captions: one per image; None or blank means that it has none.
        columns: the columns the set offers, ``image_column`` among them.

    Attributes:
        skipped: the unreadable images that were left out, each with the reason.
        left_out: what else lies in the folder and is not read, in a few words a kind.
        caption_source: where captions come from that nobody named, or None.
    """

    def __init__(
        self,
        label: str,
        names: Sequence[str],
        captions: Sequence[str | None],
        columns: Sequence[str],
    ) -> None:
        self.label, self.columns = label, tuple(columns)
        self.skipped: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self.caption_source: str | None = None
        self._names = list(names)
        self._captions = [text if text and text.strip() else None for text in captions]
        self._indices = list(range(len(self._names)))
        self._sizes: list[tuple[int, int]] = []
        self._fingerprint: str | None = None

    @abstractmethod
    def _source(self, row: int) -> Path | bytes:
        """The file, or the encoded content, of a row of the original set."""

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, i: int) -> str:
        """What image ``i`` is called."""
        return self._names[self._indices[i]]

    def caption(self, i: int) -> str | None:
        """The caption of image ``i``, or None if the set has none for it."""
        return self._captions[self._indices[i]]

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of image ``i`` once upright; known without decoding it."""
        return self._sizes[i]

    def image(self, i: int) -> Image.Image:
        """Image ``i``: RGB, upright, transparent parts on white. It is read at each call.

        Raises:
            UserError: it has become unreadable, or another size, since the set was opened.
        """
        try:
            image = read_rgb(self._source(self._indices[i]))
        except DECODE_ERRORS as error:
            raise unreadable(self.name(i), self.label, error) from error
        if (image.height, image.width) != self.size(i):
            raise UserError(
                f"{self.name(i)} in {self.label} is {image.height} pixels high and {image.width}"
                f" wide, and was {self.size(i)} when the set was opened: leave the images alone"
                " during a run."
            )
        return image

    def prompts(self, instance_prompt: str | None) -> list[str]:
        """The text of every image: its caption, else the instance prompt.

        Raises:
            UserError: an image has no caption and there is no instance prompt.
        """
        texts = []
        for i in range(len(self)):
            text = self.caption(i) or instance_prompt
            if text is None:
                raise UserError(
                    f"{self.name(i)} in {self.label} has no caption: give it one, or give"
                    " --instance_prompt for the images without."
                )
            texts.append(text)
        return texts

    def remarks(self) -> list[str]:
        """What should be known of the set and would surprise, a line each."""
        lines = []
        if self.caption_source:
            count = sum(self.caption(i) is not None for i in range(len(self)))
            others = "" if count == len(self) else ", the others get --instance_prompt"
            lines.append(
                f"captions of {self.label}: {count} of {len(self)} images have theirs from"
                f" {self.caption_source}{others} (--caption_column {NO_CAPTIONS} reads none)"
            )
        if self.left_out:
            lines.append(f"left out of {self.label}: {', '.join(self.left_out)}")
        return lines + [f"left out of {self.label}: {reason}" for reason in self.skipped]

    def fingerprint(self) -> str:
        """Identifies the content: names, captions and image files; not where they lie.

        Sets of more than ``FULL_CHECK_LIMIT`` images count with names, captions and sizes only.
        """
        if self._fingerprint is None:
            state = hashlib.blake2b(digest_size=16)
            for i in range(len(self)):
                state.update(repr((self.name(i), self.caption(i), self.size(i))).encode())
                if len(self) <= FULL_CHECK_LIMIT:
                    source = self._source(self._indices[i])
                    content = source if isinstance(source, bytes) else source.read_bytes()
                    state.update(hashlib.blake2b(content).digest())
            self._fingerprint = state.hexdigest()
        return self._fingerprint

    def check(self, *, skip_bad_images: bool) -> None:
        """Look at every image once: note its size, and refuse or leave out the unreadable.

        Raises:
            UserError: an image is unreadable and ``skip_bad_images`` is off, or none is left.
        """
        whole = len(self._names) <= FULL_CHECK_LIMIT
        good, sizes, skipped = [], [], []
        for row, name in enumerate(self._names):
            try:
                sizes.append(_sensible(upright_size(self._source(row), whole=whole)))
                good.append(row)
            except DECODE_ERRORS as error:
                if not skip_bad_images:
                    raise unreadable(name, self.label, error) from error
                skipped.append(f"{name}: {reason(error)}")
        if not good:
            raise UserError(
                f"{self.label} has no readable image: all {len(skipped)} are damaged; replace them."
            )
        self._indices, self._sizes, self.skipped = good, sizes, tuple(skipped)


def open_images(
    dataset: str,
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
    split: str = "train",
) -> ImageSet:
    """Open a set of images; each is looked at once here and read again when needed.

    Args:
        dataset: "mini" or "mini-heldout"; a local folder with images alone, with images and a
            ``metadata.jsonl`` or ``metadata.csv`` (column ``file_name``), or in any layout that
            ``datasets`` reads; or the id of a set on the hub.
        image_column: where the images are; a folder's own images are in column "image".
        caption_column: where their captions are; "none" to have none; None for those of the
            ``.txt`` files beside the images of a folder without metadata.
        config_name, cache_dir, split: as for ``datasets.load_dataset``.
        skip_bad_images: leave unreadable images out and list them in ``skipped``.

    Raises:
        UserError: no such set, column, split or image; the message names it and the fix.
    """
    from .folder import FolderImages
    from .hub import HubImages
    from .listing import look

    if caption_column == image_column:
        raise UserError(
            f'"{image_column}" can\'t be both --image_column and --caption_column: change one.'
        )
    folder = BUILT_IN[dataset]() if dataset in BUILT_IN else Path(os.path.expanduser(dataset))
    listing = look(folder) if is_folder(folder) else None
    if listing and config_name is None and listing.is_plain:
        images: ImageSet = FolderImages.open(dataset, listing, image_column, caption_column)
    else:
        _require_folder_or_id(dataset, folder)
        if listing and listing.is_unreadable:
            raise UserError(
                f'"{dataset}" holds no images that can be read, but'
                f" {' and '.join(listing.unreadable())}: make them readable."
            )
        images = HubImages.open(
            dataset,
            listing or dataset,
            image_column=image_column,
            caption_column=caption_column,
            config_name=config_name,
            cache_dir=cache_dir,
            split=split,
        )
    images.check(skip_bad_images=skip_bad_images)
    return images


def require_column(column: str, columns: Sequence[str], flag: str, label: str) -> None:
    """Refuse a column that the set does not have.

    Raises:
        UserError: it lists the columns that there are.
    """
    if column not in columns:
        raise UserError(
            f"{label} has no column {quoted(column)}: set {flag} to one of its columns"
            f" ({', '.join(quoted(name).strip(chr(34)) for name in columns)})."
        )


def require_texts(values: Sequence[object], names: Sequence[str], column: str, label: str) -> None:
    """Refuse captions that are not text.

    Raises:
        UserError: it names the first image whose caption is something else.
    """
    for value, name in zip(values, names, strict=True):
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


def unreadable(name: str, label: str, error: Exception) -> UserError:
    """The refusal of one image."""
    return UserError(
        f"the image {name} in {label} can't be read ({reason(error)}): replace or remove it, or"
        " give --skip_bad_images."
    )


def reason(error: Exception) -> str:
    """An error's first sentence, without the address of a buffer that Pillow likes to name."""
    text = str(error).strip() or type(error).__name__
    if "cannot identify image file" in text:
        return "not an image file that Pillow knows"
    return text.splitlines()[0].split(". ")[0].rstrip(".")


def _sensible(size: tuple[int, int]) -> tuple[int, int]:
    if max(size) > MOST_ELONGATED * min(size):
        raise ValueError(
            f"it is {size[1]} pixels wide and {size[0]} high, more than {MOST_ELONGATED} to 1;"
            " cut it"
        )
    return size


def _require_folder_or_id(dataset: str, folder: Path) -> None:
    if is_file(folder):
        raise UserError(f'"{dataset}" is a file: give the folder that holds the images.')
    looks_like_path = dataset.startswith((".", "/", "~")) or "\\" in dataset
    if not is_folder(folder) and (looks_like_path or dataset.count("/") > 1):
        raise UserError(f'there is no folder "{dataset}": correct the path, or give a hub id.')
