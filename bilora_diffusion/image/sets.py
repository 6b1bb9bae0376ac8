"""Images with their captions, from the miniature, a local folder or the Hugging Face hub."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError, reason
from .decode import DECODE_ERRORS, read_rgb, upright_size
from .masks import Masks

FULL_CHECK_LIMIT = 2000
"""Up to this many images are decoded whole when opened; of more, only the headers are read."""

MOST_ELONGATED = 64
"""Times a side may be longer than the other: resizing makes of it what memory can't hold."""

NO_CAPTIONS = "none"
"""The ``--caption_column`` of one who wants no captions, wherever they lie."""


class ImageSet:
    """Images that are read when needed, each with the caption that belongs to it.

    Every image is looked at once here, for its size, and refused or left out if unreadable.

    Args:
        label: what to call the set in messages (the ``--dataset`` value).
        rows: one per image: its file under "path" or its encoded content under "bytes", as
            ``datasets`` keeps images that it does not decode.
        names: one per image, for messages and logs.
        captions: one per image; None or blank means that it has none.
        left_out: what else lies in the folder and is not read, in a few words a kind.
        caption_source: where captions come from that nobody named, or None.
        masks: which part of each is learned; None for all of each.
        skip_bad_images: leave unreadable images out and list them in ``skipped``, each with the
            reason.

    Raises:
        UserError: an image is unreadable and ``skip_bad_images`` is off, or none is left.
    """

    def __init__(
        self,
        label: str,
        rows: Sequence[Mapping[str, Any] | None],
        names: Sequence[str],
        captions: Sequence[str | None],
        *,
        left_out: Sequence[str] = (),
        caption_source: str | None = None,
        masks: Masks | None = None,
        skip_bad_images: bool = False,
    ) -> None:
        self.label, self.left_out, self.caption_source = label, tuple(left_out), caption_source
        self._rows, self._names = rows, list(names)
        self._captions = [text if text and text.strip() else None for text in captions]
        self._indices: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._fingerprint: str | None = None
        self._contents: dict[int, bytes] = {}
        self.masks, self._masked = masks, set[int]()
        skipped, whole = [], len(self._names) <= FULL_CHECK_LIMIT
        for row, name in enumerate(self._names):
            try:
                size = _sensible(upright_size(self._source(row), whole=whole))
                if masks is not None and masks.checked(row, size):
                    self._masked.add(row)
                self._sizes.append(size)
                self._indices.append(row)
            except DECODE_ERRORS as error:
                if not skip_bad_images:
                    raise self._unreadable(name, error) from error
                skipped.append(f"{name}: {reason(error)}")
        if not self._indices:
            raise UserError(
                f"{label} has no readable image: all {len(skipped)} are damaged; replace them."
            )
        self.skipped = tuple(skipped)

    def _source(self, row: int) -> Path | bytes:
        if (source := encoded(self._rows[row])) is None:
            raise ValueError("the row holds no image")
        return source

    def _unreadable(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"the image {name} in {self.label} can't be read ({reason(error)}): replace or remove"
            " it, or give --skip_bad_images."
        )

    def only(self, chosen: Sequence[int]) -> ImageSet:
        """A set of some of the images, in the given order; they are not looked at again."""
        part = copy.copy(self)
        part._indices = [self._indices[i] for i in chosen]
        part._sizes = [self._sizes[i] for i in chosen]
        part._fingerprint = None
        return part

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
            raise self._unreadable(self.name(i), error) from error
        if (image.height, image.width) != self.size(i):
            raise UserError(
                f"{self.name(i)} in {self.label} is {image.height} pixels high and {image.width}"
                f" wide, and was {self.size(i)} when the set was opened: leave the images alone"
                " during a run."
            )
        return image

    def mask(self, i: int) -> Image.Image | None:
        """The mask of image ``i``, mode "L" and of its size; None if all of it is learned.

        Raises:
            UserError: it has become unreadable since the set was opened.
        """
        row = self._indices[i]
        if self.masks is None or row not in self._masked:
            return None
        try:
            return self.masks.read(row)
        except DECODE_ERRORS as error:
            raise self._unreadable(self.name(i), error) from error

    def require_masks(self) -> None:
        """Refuse masks that hide nothing of any image.

        Raises:
            UserError: there are such.
        """
        if self.masks is not None and not self._masked:
            raise UserError(
                f"no mask of {self.label}, from {self.masks.where}, hides anything: blacken what is"
                " not to be learned, or drop the masks."
            )

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
        if self.masks is not None:
            count = sum(row in self._masked for row in self._indices)
            lines.append(
                f"masks of {self.label}: {count} of {len(self)} images have theirs from"
                f" {self.masks.where}"
            )
        if self.left_out:
            lines.append(f"left out of {self.label}: {', '.join(self.left_out)}")
        return lines + [f"left out of {self.label}: {reason}" for reason in self.skipped]

    def fingerprint(self) -> str:
        """Identifies the content: names, captions, image files, masks; not where they lie.

        Sets of more than ``FULL_CHECK_LIMIT`` images count with names, captions and sizes only.
        """
        if self._fingerprint is None:
            state = hashlib.blake2b(digest_size=16)
            for i in range(len(self)):
                state.update(repr((self.name(i), self.caption(i), self.size(i))).encode())
                if len(self) <= FULL_CHECK_LIMIT:
                    state.update(self.content(i))
            self._fingerprint = state.hexdigest()
        return self._fingerprint

    def content(self, i: int) -> bytes:
        """Identifies the file of image ``i`` and what its mask shows, wherever they lie."""
        row = self._indices[i]
        if row not in self._contents:
            source = self._source(row)
            content = source if isinstance(source, bytes) else source.read_bytes()
            mark = hashlib.blake2b(content).digest()
            if (mask := self.mask(i)) is not None:
                mark += hashlib.blake2b(mask.tobytes()).digest()
            self._contents[row] = mark
        return self._contents[row]

    def pictures(self) -> list[tuple[str, bytes]]:
        """Name of each image, and what identifies its file without its mask; [] of more than
        ``FULL_CHECK_LIMIT`` images, whose files are not all read beforehand.
        """
        if len(self) > FULL_CHECK_LIMIT:
            return []
        size = hashlib.blake2b().digest_size
        return [(self.name(i), self.content(i)[:size]) for i in range(len(self))]


def encoded(row: Mapping[str, Any] | None) -> Path | bytes | None:
    """A file, or its content, as ``datasets`` keeps an image that it does not decode."""
    stored = row or {}
    if stored.get("bytes") is not None:
        return stored["bytes"]
    return None if stored.get("path") is None else Path(stored["path"])


def _sensible(size: tuple[int, int]) -> tuple[int, int]:
    if max(size) > MOST_ELONGATED * min(size):
        raise ValueError(
            f"it is {size[1]} pixels wide and {size[0]} high, more than {MOST_ELONGATED} to 1;"
            " cut it"
        )
    return size
