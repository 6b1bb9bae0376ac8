"""Images with their captions and masks, read when they are needed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from PIL import Image

from ..core.errors import UserError, reason
from ..core.seeds import digest_texts
from ..run.data import SampleContent, hash_samples
from .image_files import DECODE_ERRORS, read_rgb, upright_size

FULL_CHECK_LIMIT = 2000
"""Up to this many images are decoded whole when opened; of more, only the headers are read."""
MAX_ASPECT_RATIO = 64
"""Times a side may be longer than the other: memory can't hold what resizing makes of more."""
T = TypeVar("T")


@dataclass(eq=False)
class Entry:
    """One image of a set."""

    name: str  # for messages and logs
    source: Callable[[], Path | bytes | None]  # its file, or its encoded content; None without one
    caption: str | None = None
    mask: Callable[[], Image.Image | None] | None = None  # of what is learned, mode L; None: all
    size: tuple[int, int] = (0, 0)  # (height, width) once upright; known when it was checked
    concept: int = 0  # the number of its concept, from 0
    num_bytes: int = 0  # of its file; known when it was checked
    mask_hash: bytes = b""  # of a mask that hides something; known when it was checked

    def encoded(self) -> Path | bytes:
        """Its file, or its encoded content."""
        if (source := self.source()) is None:
            raise ValueError("the row holds no image")
        return source

    def check(self, *, decode: bool) -> None:
        """Read its size, and drop a mask that hides nothing; ``decode`` reads every pixel, too.

        Raises:
            One of ``DECODE_ERRORS`` if it can't be read, or has a mask that does not fit.
        """
        source = self.encoded()
        self.size = height, width = upright_size(source, decode=decode)
        self.num_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        if max(self.size) > MAX_ASPECT_RATIO * min(self.size):
            raise ValueError(
                f"it is {width} pixels wide and {height} high, more than {MAX_ASPECT_RATIO} to 1;"
                " cut it"
            )
        if (mask := self.mask and self.mask()) is None:
            self.mask = None
            return
        if mask.size != (width, height):
            raise ValueError(
                f"its mask is {mask.width} x {mask.height} pixels and it is {width} x {height};"
                " make them alike"
            )
        if mask.getbbox() is None:  # no pixel above 0
            raise ValueError("its mask is black all over, so nothing of it would be learned")
        if mask.getextrema() == (255, 255):  # all of the image is learned
            self.mask = None
        else:
            self.mask_hash = hashlib.blake2b(mask.tobytes()).digest()

    @cached_property
    def file_hash(self) -> bytes:
        """A hash of the file, wherever it lies."""
        source = self.encoded()
        content = source if isinstance(source, bytes) else source.read_bytes()
        return hashlib.blake2b(content).digest()

    @cached_property
    def content(self) -> bytes:
        """Hashes of the file and of what the mask shows, wherever they lie."""
        return self.file_hash + self.mask_hash


class ImageSet:
    """Images that are read when needed, each with the caption that belongs to it.

    Every image is looked at once here, for its size, and refused or left out if unreadable.

    Args:
        label: what to call the set in messages (the ``--dataset`` value).
        entries: the images.
        remarks: what should be known of how they were found, a line each.
        masks_from: where their masks come from, or None if no masks were asked for or found.
        captions_from: where their captions come from, if nobody named a column.
        skip_bad_images: leave unreadable images out and list them in ``skipped``, each with the
            reason.

    Raises:
        UserError: an image is unreadable and ``skip_bad_images`` is off, or none is left.
    """

    def __init__(
        self,
        label: str,
        entries: Sequence[Entry],
        *,
        remarks: Sequence[str] = (),
        masks_from: str | None = None,
        captions_from: str | None = None,
        skip_bad_images: bool = False,
    ) -> None:
        self.label, self._remarks, self.skipped = label, remarks, list[str]()
        self._masks_from, self._captions_from = masks_from, captions_from
        self.entries: list[Entry] = []
        self._fingerprint: str | None = None
        for entry in entries:
            try:
                entry.check(decode=len(entries) <= FULL_CHECK_LIMIT)
            except DECODE_ERRORS as error:
                if not skip_bad_images:
                    raise self._unreadable(entry, error) from error
                self.skipped.append(f"{entry.name}: {reason(error)}")
            else:
                self.entries.append(entry)
        if not self.entries:
            raise UserError(
                f"{label} has no readable image: all {len(entries)} are damaged; replace them."
            )

    def _unreadable(self, entry: Entry, error: Exception) -> UserError:
        return UserError(
            f"the image {entry.name} in {self.label} can't be read ({reason(error)}): replace or"
            " remove it, or give --skip_bad_images."
        )

    def only(self, chosen: Sequence[int]) -> ImageSet:
        """A set of some of the images, in the given order; they are not looked at again."""
        part = copy.copy(self)
        part.entries = [self.entries[i] for i in chosen]
        part._fingerprint = None
        return part

    @classmethod
    def joined(cls, label: str, sets: Mapping[str, ImageSet | None]) -> ImageSet | None:
        """The images of several concepts, by their names, as one set, each called CONCEPT/NAME;
        None where no concept has any.
        """
        first = next((images for images in sets.values() if images is not None), None)
        if first is None:
            return None
        joint_set = first.only([])  # images that were checked are not checked again
        joint_set.label, joint_set.skipped, joint_set._remarks = label, [], ()
        joint_set._masks_from = joint_set._captions_from = None
        for number, (concept, images) in enumerate(sets.items()):
            for entry in images.entries if images else ():
                joint_entry = copy.copy(entry)
                joint_entry.name, joint_entry.concept = f"{concept}/{entry.name}", number
                joint_set.entries.append(joint_entry)
        return joint_set

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, i: int) -> Image.Image:
        """Image ``i``: RGB, upright, transparent parts on white. It is read at each call.

        Raises:
            UserError: it has become unreadable, or another size, since the set was opened.
        """
        entry = self.entries[i]
        try:
            image = read_rgb(entry.encoded())
        except DECODE_ERRORS as error:
            raise self._unreadable(entry, error) from error
        if (image.height, image.width) != entry.size:
            raise UserError(
                f"{entry.name} in {self.label} is {image.height} pixels high and {image.width}"
                f" wide, and was {entry.size} when the set was opened: leave the images alone"
                " during a run."
            )
        return image

    def mask(self, i: int) -> Image.Image | None:
        """Mask of image ``i``, mode "L" and of its size; None if all of it is learned."""
        entry = self.entries[i]
        try:
            return None if entry.mask is None else entry.mask()
        except DECODE_ERRORS as error:
            raise self._unreadable(entry, error) from error

    def require_masks(self) -> None:
        """Refuse masks that hide nothing of any image."""
        if self._masks_from and not any(entry.mask for entry in self.entries):
            raise UserError(
                f"no mask of {self.label}, from {self._masks_from}, hides anything: blacken what is"
                " not to be learned, or drop the masks."
            )

    def of_each(self, values: Sequence[T]) -> list[T]:
        """For each image the value that belongs to its concept."""
        return [values[entry.concept] for entry in self.entries]

    def remarks(self) -> list[str]:
        """Facts of the set that would surprise, a line each."""
        lines = []
        if self._captions_from:
            count = sum(entry.caption is not None for entry in self.entries)
            fallback = "" if count == len(self) else ", the others get --instance_prompt"
            lines.append(
                f"captions of {self.label}: {count} of {len(self)} images have theirs from"
                f" {self._captions_from}{fallback} (--caption_column none reads none)"
            )
        if self._masks_from:
            count = sum(entry.mask is not None for entry in self.entries)
            lines.append(
                f"masks of {self.label}: {count} of {len(self)} images have theirs from"
                f" {self._masks_from}"
            )
        lines += self._remarks
        lines += [f"left out of {self.label}: {skipped}" for skipped in self.skipped]
        return lines

    def fingerprint(self) -> str:
        """A hash of `sample_contents`."""
        if self._fingerprint is None:
            self._fingerprint = hash_samples(self.sample_contents())
        return self._fingerprint

    def sample_contents(self) -> list[SampleContent]:
        """Name of each image, and hashes of its file, caption and mask; not where they lie.

        In a set of more than ``FULL_CHECK_LIMIT`` images, whose files are not all read beforehand,
        the size in pixels and bytes stands for a file's content.
        """
        samples: list[SampleContent] = []
        for entry in self.entries:
            if len(self) <= FULL_CHECK_LIMIT:
                picture = entry.file_hash.hex()
            else:
                picture = digest_texts([str(entry.size), str(entry.num_bytes)])
            hashes = {"picture": picture}
            if entry.caption is not None:
                hashes["caption"] = digest_texts([entry.caption])
            if entry.mask_hash:
                hashes["mask"] = entry.mask_hash.hex()
            samples.append(SampleContent(entry.name, hashes))
        return samples

    def pictures(self) -> list[tuple[str, bytes]]:
        """Name of each image and a hash of its file without its mask; [] of more than
        ``FULL_CHECK_LIMIT`` images, whose files are not all read beforehand.
        """
        if len(self) > FULL_CHECK_LIMIT:
            return []
        return [(entry.name, entry.file_hash) for entry in self.entries]
