"""The training stream of DreamBooth: order of the images, their crops and captions."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import UserError
from ..core.seeds import digest_texts, generator
from ..run.interruption import SIGNALS
from ..train.order import KindsOrder, SampleOrder
from . import buckets, crops
from .captions import Captions, texts
from .config import DreamBoothConfig
from .sets import ImageSet

Slots = tuple[int, tuple[int, ...]]
"""A step and the positions of a micro-batch within the step's whole batch."""
MAX_CACHED = 2000
"""``--cache_latents auto`` caches the latents of at most so many images in memory."""
MOST_BYTES = 10**9
"""Of resized images that a training process caches, with those that read images for it."""


class Resized:
    """Images and their masks as small as covers what is cut out of them, 8 bits a value; decoding
    and resizing a photo of 12 megapixels takes half a second, cutting next to nothing.

    Args:
        most_bytes: images that do not fit into so many are resized anew at each visit.
    """

    def __init__(self, most_bytes: int) -> None:
        self._room = most_bytes
        self._cached: dict[tuple[int, int, buckets.Size], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, visit: Visit) -> tuple[Tensor, Tensor | None]:
        """The image of a draw, (3, H, W) in 0 to 255, and its mask, (1, H, W), if it has one; its
        set lives as long as this.
        """
        images, key = visit.images, (id(visit.images), visit.sample, visit.size)
        if key in self._cached:
            return self._cached[key]
        mask, how = images.mask(visit.sample), visit.cfg.image_interpolation_mode
        made = (
            crops.fitted(images.image(visit.sample), visit.size, how),
            None if mask is None else crops.fitted(mask, visit.size, "bilinear"),
        )
        size = sum(part.nbytes for part in made if part is not None)
        if size <= self._room:
            self._room -= size
            self._cached[key] = made
        return made


@dataclass
class Visit:
    """One draw of one image: its pixels, and SDXL's conditioning on size and crop.

    ``kind`` is "instance", "class" or "grid"; ``slot`` is the position within the step's batch.
    """

    images: ImageSet = field(repr=False)
    cfg: DreamBoothConfig = field(repr=False)
    kind: str
    sample: int
    slot: int
    crop: crops.Crop
    size: buckets.Size
    caption: str
    loaded: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The image's name, for messages."""
        return self.images.entries[self.sample].name

    @property
    def content(self) -> tuple[str, ...]:
        """Draws with the same content see the same pixels, in whichever run and set."""
        seen = repr((tuple(self.crop), tuple(self.size)))
        return self.images.entries[self.sample].content.hex(), seen

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's micro-conditioning: original (h, w), crop (top, left), target (h, w)."""
        return *self.images.entries[self.sample].size, self.crop.top, self.crop.left, *self.size

    def read(self, resized: Resized | None = None) -> tuple[Tensor, Tensor | None]:
        """The image as it is seen, (3, H, W) in [-1, 1], and its mask, (1, H, W) in [0, 1] or None;
        read now unless they were read before.
        """
        if self.loaded is not None:
            return self.loaded
        image, mask = (resized or Resized(0))(self)
        pixels = crops.cut(image, self.crop, self.size) * 2 - 1
        return pixels, None if mask is None else crops.cut(mask, self.crop, self.size)

    def digest(self, noise: str) -> str:
        """Identifies this visit's data together with its noise."""
        size = self.size if self.cfg.aspect_ratio_buckets else ()
        seen = repr((self.kind, self.sample, *self.crop, *size))
        return digest_texts([self.images.fingerprint(), seen, self.caption, noise])


class VisitStream:
    """Instance images, and class images beside them, in an order that depends on the seed alone.

    Raises:
        UserError: an image without a prompt, or latents that can't be cached.
    """

    def __init__(
        self, cfg: DreamBoothConfig, images: ImageSet, classes: ImageSet | None = None
    ) -> None:
        self.cfg, self.images, self.classes = cfg, images, classes
        self._captions = Captions(cfg, images)
        self.sizes = _sizes(cfg, images)
        self._of_one_size = len(set(self.sizes)) == 1
        self._own = images.of_each(cfg.each)
        self._class_own = classes.of_each(cfg.each) if classes else []
        self._repeats = [own.repeats for own in self._own]
        self._order = SampleOrder(len(images), cfg.seed, self._repeats)
        self._by_size: KindsOrder | None = None
        # Class images have a stream of their own, so that all of them are seen however few the
        # instance images are.
        most = sum(own.num_class_images for own in cfg.each)
        self._class_order = (
            SampleOrder(min(len(classes), most), cfg.seed, purpose="class order")
            if classes
            else None
        )
        # The pass over the larger set is an epoch, as in diffusers' script.
        self.num_samples = max(len(self._order), len(self._class_order or ()))
        sets = [s for s in (images, classes) if s is not None]
        odd = [
            entry.name
            for s in sets
            for entry, size in zip(s.entries, _sizes(cfg, s), strict=True)
            if not _cropped_alike(cfg, entry.size, size)
        ]
        if cfg.cache_latents == "yes" and odd:
            raise UserError(
                f"--cache_latents yes needs images that are always cropped alike, and '{odd[0]}' is"
                " not of the shape that it is cut to: add --center_crop, or drop --cache_latents."
            )
        few = sum(map(len, sets)) <= MAX_CACHED
        self._caches = cfg.cache_latents == "yes" or (cfg.cache_latents == "auto" and few)
        self._reads_ahead = bool(odd) or not self._caches

    def caches(self, visit: Visit) -> bool:
        """Test that the latents of a draw are cached for the draws that see the same."""
        seen = visit.images.entries[visit.sample].size
        return self._caches and _cropped_alike(self.cfg, seen, visit.size)

    def captions(self) -> list[str]:
        """Every caption that training can meet, without repetition."""
        told = self.classes or self.cfg.prior_prediction_weight
        of_classes = [str(own.class_prompt) for own in self.cfg.each] if told else []
        return list(dict.fromkeys(self._captions.every() + of_classes))

    def visits(
        self, schedule: Sequence[Slots], step_size: int
    ) -> Iterator[tuple[Slots, list[Visit]]]:
        """For each (step, slots): the instance visits, then as many class visits, slot by slot."""
        loader = DataLoader(
            _Visits(self, schedule, step_size),
            batch_size=None,
            shuffle=False,
            num_workers=self.cfg.dataloader_num_workers if self._reads_ahead else 0,
            worker_init_fn=_ignore_signals,
        )
        yield from zip(schedule, loader, strict=True)

    def draw(self, step: int, slot: int, step_size: int, kind: str) -> Visit:
        """The visit of one slot of one step; ``kind`` is "instance" or "class"."""
        instance = kind == "instance"
        whole = self._whole_order(step_size)
        order, images = (whole, self.images) if instance else (self._class_order, self.classes)
        assert order is not None
        assert images is not None
        sample = order.sample(step * step_size + slot)
        own = (self._own if instance else self._class_own)[sample]
        # Class images are cut as the instance images of their step are.
        size = self.sizes[sample if instance else whole.sample(step * step_size)]
        crop = crops.draw(
            images.entries[sample].size,
            size,
            center_crop=self.cfg.center_crop,
            random_flip=own.random_flip,
            generator=generator(self.cfg.seed, "crop", step, sample, slot, kind),
        )
        caption = self._captions.draw(sample, step, slot) if instance else str(own.class_prompt)
        return Visit(images, own, kind, sample, slot, crop, size, caption)

    def _whole_order(self, step_size: int) -> SampleOrder | KindsOrder:
        """The instance images' order; with several sizes those of a step are of one."""
        if self._of_one_size:
            return self._order
        if self._by_size is None or self._by_size.step_size != step_size:
            self._by_size = KindsOrder(self.sizes, self.cfg.seed, step_size, self._repeats)
        return self._by_size


def _ignore_signals(_: int) -> None:
    """In a process that reads images: Ctrl-C reaches it too, and the run's own process ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Visits(Dataset):
    """The visits of each entry of a schedule; those that are not cached are read here."""

    def __init__(self, stream: VisitStream, schedule: Sequence[Slots], step_size: int) -> None:
        self._stream, self._schedule, self._step_size = stream, schedule, step_size
        # Each process that reads images has a cache of its own.
        self._resized = Resized(MOST_BYTES // max(1, stream.cfg.dataloader_num_workers))

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, index: int) -> list[Visit]:
        step, slots = self._schedule[index]
        kinds = ["instance"] + (["class"] if self._stream.classes else [])
        visits = [
            self._stream.draw(step, slot, self._step_size, kind) for kind in kinds for slot in slots
        ]
        for visit in visits:
            if not self._stream.caches(visit):
                visit.loaded = visit.read(self._resized)
        return visits


def centered_visits(images: ImageSet, cfg: DreamBoothConfig) -> Iterator[Visit]:
    """Every image once, center-cropped and not mirrored: how the grid loss sees a set."""
    sizes, own = _sizes(cfg, images), images.of_each(cfg.each)
    for sample, caption in enumerate(texts(cfg, images)):
        crop = crops.draw(
            images.entries[sample].size,
            sizes[sample],
            center_crop=True,
            random_flip=False,
            generator=generator("grid"),
        )
        yield Visit(images, own[sample], "grid", sample, 0, crop, sizes[sample], caption)


def _sizes(cfg: DreamBoothConfig, images: ImageSet) -> list[buckets.Size]:
    """Size that each image is cut to."""
    sizes = buckets.sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    return [buckets.nearest(entry.size, sizes) for entry in images.entries]


def _cropped_alike(cfg: DreamBoothConfig, size: buckets.Size, target: buckets.Size) -> bool:
    """Test that every draw of an image sees the same part of it."""
    return cfg.center_crop or crops.resized(size, target) == target
