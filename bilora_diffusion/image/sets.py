"""Image sets with captions and masks. The images are read when they are used."""

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
from .look_alikes import Look, look_of

# When a set with at most this many images is opened, all images are decoded. In a larger set, only
# the headers are read.
FULL_CHECK_LIMIT = 2000
# Maximum ratio of the longer side to the shorter side. A longer image that is resized to cover a
# square would not fit into memory.
MAX_ASPECT_RATIO = 64
T = TypeVar("T")


@dataclass(eq=False)
class Entry:
    """One image of a set."""

    name: str  # name in messages and logs
    # Returns the image's file or content, or None if a table row has no image.
    source: Callable[[], Path | bytes | None]
    caption: str | None = None
    # Returns the mask in mode L, which is white where the image is learned; None if there is no
    # mask.
    mask: Callable[[], Image.Image | None] | None = None
    concept: int = 0  # index of the image's concept
    # Set by `check`:
    size: tuple[int, int] = (0, 0)  # (height, width) of the upright image
    num_bytes: int = 0  # size of the file or content, in bytes
    mask_hash: bytes = b""  # hash of the mask; b"" without a mask
    look: Look | None = None  # None in a large set, whose images are not decoded

    def encoded_image(self) -> Path | bytes:
        """Return the image's file or content."""
        source = self.source()
        if source is None:
            raise ValueError("the row holds no image")
        return source

    def check(self, *, decode: bool) -> None:
        """Read the image's size, and remove a mask that hides nothing.

        Args:
            decode: also decode all pixels and compute ``look``.

        Raises:
            One of ``DECODE_ERRORS`` if the image or its mask can't be read, or if the image is too
            long, or its mask is black or has another size.
        """
        source = self.encoded_image()
        if decode:
            image = read_rgb(source)
            width, height = image.size
            self.look = look_of(image)
        else:
            height, width = upright_size(source)
        self.size = height, width
        if isinstance(source, bytes):
            self.num_bytes = len(source)
        else:
            self.num_bytes = source.stat().st_size
        if max(self.size) > MAX_ASPECT_RATIO * min(self.size):
            raise ValueError(
                f"it is {width} pixels wide and {height} high, more than {MAX_ASPECT_RATIO} to 1;"
                " crop it"
            )
        mask = None
        if self.mask is not None:
            mask = self.mask()
        if mask is None:
            self.mask = None
            return
        if mask.size != (width, height):
            raise ValueError(
                f"its mask is {mask.width} x {mask.height} pixels, but the image is {width} x"
                f" {height}; make their sizes equal"
            )
        if mask.getbbox() is None:  # no pixel above 0
            raise ValueError("its mask is all black, so nothing of the image would be learned")
        if mask.getextrema() == (255, 255):  # the whole image is learned
            self.mask = None
        else:
            self.mask_hash = hashlib.blake2b(mask.tobytes()).digest()

    @cached_property
    def file_hash(self) -> bytes:
        """A hash of the file's content."""
        content = self.encoded_image()
        if isinstance(content, Path):
            content = content.read_bytes()
        return hashlib.blake2b(content).digest()


class ImageSet:
    """Images with their captions and masks. The images are read when they are used.

    The constructor reads each image once, for its size, and refuses or skips unreadable images.

    Args:
        label: name of the set in messages (the ``--dataset`` value).
        entries: the images.
        remarks: notes for the user on how the images were found, one line each.
        masks_from: source of the masks, for messages; None if there are no masks.
        captions_from: source of the captions, for messages; None if they are in a column.
        skip_bad_images: skip unreadable images and list them in ``skipped``, each with the reason.

    Raises:
        UserError: an image is unreadable and ``skip_bad_images`` is off, or no readable image is
            left.
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
        self.label = label
        self.skipped: list[str] = []
        self._remarks = remarks
        self._masks_from = masks_from
        self._captions_from = captions_from
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

    def only(self, indices: Sequence[int]) -> ImageSet:
        """Return the set of the images with these indices, in this order, without a new check."""
        part = copy.copy(self)
        part.entries = [self.entries[index] for index in indices]
        part._fingerprint = None
        return part

    @classmethod
    def join(cls, label: str, sets: Mapping[str, ImageSet | None]) -> ImageSet | None:
        """Join the image sets of several concepts. Images get the name CONCEPT/NAME.

        Args:
            label: name of the joint set in messages.
            sets: image sets by the concept's name; None for a concept without images.

        Returns:
            The joint set, or None if no concept has images.
        """
        entries = []
        joint_set = None
        for number, (concept, images) in enumerate(sets.items()):
            if images is None:
                continue
            # A copy without images, since `__init__` would check them again.
            joint_set = images.only([])
            for entry in images.entries:
                joint_entry = copy.copy(entry)
                joint_entry.name = f"{concept}/{entry.name}"
                joint_entry.concept = number
                entries.append(joint_entry)
        if joint_set is not None:
            joint_set.label = label
            joint_set.entries = entries
            # The notes of the concepts' sets have already been logged.
            joint_set.skipped = []
            joint_set._remarks = ()
            joint_set._masks_from = joint_set._captions_from = None
        return joint_set

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, number: int) -> Image.Image:
        """Read an image as upright RGB, with white in place of transparent parts.

        Raises:
            UserError: since the set was opened, the image has become unreadable or has changed its
                size.
        """
        entry = self.entries[number]
        try:
            image = read_rgb(entry.encoded_image())
        except DECODE_ERRORS as error:
            raise self._unreadable(entry, error) from error
        if (image.height, image.width) != entry.size:
            raise UserError(
                f"{entry.name} in {self.label} is {image.height} pixels high and {image.width}"
                f" wide, but was {entry.size} when the set was opened: do not change the images"
                " during a run."
            )
        return image

    def mask(self, number: int) -> Image.Image | None:
        """Read a mask, of mode "L" and the image's size; None if the whole image is learned."""
        entry = self.entries[number]
        if entry.mask is None:
            return None
        try:
            return entry.mask()
        except DECODE_ERRORS as error:
            raise self._unreadable(entry, error) from error

    def require_masks(self) -> None:
        """Raise UserError if the set was opened with masks but no mask hides anything."""
        if self._masks_from and not any(entry.mask for entry in self.entries):
            raise UserError(
                f"no mask of the images in {self.label}, from {self._masks_from}, hides anything:"
                " make the parts that are not to be learned black, or transparent for --alpha_mask,"
                " or drop the masks."
            )

    def values_of_images(self, values: Sequence[T]) -> list[T]:
        """Return, for each image, the value of its concept.

        Args:
            values: one value for each concept.
        """
        return [values[entry.concept] for entry in self.entries]

    def remarks(self) -> list[str]:
        """Return notes for the user, one line each."""
        lines = []
        if self._captions_from:
            count = sum(entry.caption is not None for entry in self.entries)
            fallback = ""
            if count < len(self):
                fallback = ", the others get --instance_prompt"
            lines.append(
                f"captions of {self.label}: {count} of {len(self)} images get theirs from"
                f" {self._captions_from}{fallback} (--caption_column none ignores all captions)"
            )
        if self._masks_from:
            count = sum(entry.mask is not None for entry in self.entries)
            lines.append(
                f"masks of {self.label}: {count} of {len(self)} images get theirs from"
                f" {self._masks_from}"
            )
        return lines + self.left_out()

    def left_out(self) -> list[str]:
        """Return notes on folder names and files that are not read, one line each."""
        skipped_images = [f"left out of {self.label}: {skipped}" for skipped in self.skipped]
        return [*self._remarks, *skipped_images]

    def fingerprint(self) -> str:
        """Return the hash of `sample_contents`."""
        if self._fingerprint is None:
            self._fingerprint = hash_samples(self.sample_contents())
        return self._fingerprint

    def sample_contents(self) -> list[SampleContent]:
        """Return the name of each image, and hashes of its content, caption and mask.

        If there are more than ``FULL_CHECK_LIMIT`` images, the files are not read. The hash of the
        content is then a hash of the image's size in pixels and in bytes.
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

    def looks(self) -> list[Look]:
        """Return the look of each image; [] if the set is so large that no image was decoded."""
        looks = []
        for entry in self.entries:
            if entry.look is None:
                return []
            looks.append(entry.look)
        return looks

    def names(self) -> list[str]:
        """Return the name of each image."""
        return [entry.name for entry in self.entries]

    def pictures(self) -> list[tuple[str, bytes]]:
        """Return the name of each image and a hash of its file.

        If there are more than ``FULL_CHECK_LIMIT`` images, the files are not read, and the result
        is [].
        """
        if len(self) > FULL_CHECK_LIMIT:
            return []
        return [(entry.name, entry.file_hash) for entry in self.entries]
