"""The training stream of DreamBooth: order of the images, their crops and captions."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import UserError
from ..core.files import counted
from ..core.seeds import digest_texts, generator
from ..run.interruption import SIGNALS
from ..train.task import KindsOrder, SampleOrder
from .captions import Captions, fixed_texts
from .config import DreamBoothConfig
from .crops import (
    Crop,
    ResizedImages,
    Size,
    bucket_sizes,
    covering_size,
    cut,
    nearest_bucket,
    sample_crop,
)
from .sets import ImageSet

# A step, and the positions (slots) of a micro-batch within the step's batch.
MicroBatchPlace = tuple[int, tuple[int, ...]]
# Pixels, (3, H, W) in [-1, 1], and mask, (1, H, W) in [0, 1] or None.
PixelsAndMask = tuple[Tensor, Tensor | None]
# ``--cache_latents auto`` caches the latents of at most this many images in memory.
MAX_CACHED_LATENTS = 2000
# Limit of resized images in the caches of a training process and its data loader processes.
MAX_RESIZED_BYTES = 10**9
# Kinds of samples: instance image, class image, image of the held-out loss's grid.
INSTANCE, CLASS, GRID = "instance", "class", "grid"


@dataclass
class TrainingSample:
    """An image of a training step: its crop and caption, and SDXL's conditioning on size and crop.

    Args:
        images: the image set.
        cfg: configuration of the image's concept.
        kind: `INSTANCE`, `CLASS` or `GRID`.
        index: index of the image in the set.
        slot: position within the step's batch.
        size: size of the crop, in pixels.
        pixels_and_mask: result of `read`, if a data loader process has read it.
    """

    images: ImageSet = field(repr=False)
    cfg: DreamBoothConfig = field(repr=False)
    kind: str
    index: int
    slot: int
    crop: Crop
    size: Size
    caption: str
    pixels_and_mask: PixelsAndMask | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The image's name, for messages."""
        return self.images.entries[self.index].name

    @property
    def content(self) -> tuple[str, ...]:
        """Key of the sample's pixels; equal for the same file, crop and size, in any run."""
        entry = self.images.entries[self.index]
        place = repr((tuple(self.crop), tuple(self.size)))
        return (entry.file_hash + entry.mask_hash).hex(), place

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's micro-conditioning: original (h, w), crop (top, left), target (h, w)."""
        original_height, original_width = self.images.entries[self.index].size
        height, width = self.size
        return original_height, original_width, self.crop.top, self.crop.left, height, width

    def read(self, resized_images: ResizedImages | None = None) -> PixelsAndMask:
        """The pixels, (3, H, W) in [-1, 1], and their mask, (1, H, W) in [0, 1] or None.

        They are read from the file, unless a data loader process has read them.

        Args:
            resized_images: cache of resized images.
        """
        if self.pixels_and_mask is not None:
            return self.pixels_and_mask
        cache = resized_images or ResizedImages(max_bytes=0)  # caches nothing
        interpolation = self.cfg.image_interpolation_mode
        image, mask = cache.get(self.images, self.index, self.size, interpolation)
        pixels = cut(image, self.crop, self.size) * 2 - 1  # from [0, 1]
        if mask is not None:
            mask = cut(mask, self.crop, self.size)
        return pixels, mask

    def digest(self, noise: str) -> str:
        """Hash this sample's data together with the given hash of its noise."""
        # Sizes differ only with buckets.
        size = self.size if self.cfg.aspect_ratio_buckets else ()
        place = repr((self.kind, self.index, *self.crop, *size))
        return digest_texts([self.images.fingerprint(), place, self.caption, noise])


class TrainingStream:
    """The order of instance and class images: a function of the seed and the data.

    Raises:
        UserError: an image without a prompt, or latents that can't be cached.
    """

    def __init__(
        self, cfg: DreamBoothConfig, images: ImageSet, classes: ImageSet | None = None
    ) -> None:
        self.cfg = cfg
        self.images = images
        self.classes = classes
        self._captions = Captions(cfg, images)
        self.sizes = target_sizes(cfg, images)
        self._has_one_size = len(set(self.sizes)) == 1  # as without buckets
        self._configs = images.values_of_images(cfg.concept_configs)
        self._repeats = [config.repeats for config in self._configs]
        self._order = SampleOrder(len(images), cfg.seed, self._repeats)
        self._order_by_size: KindsOrder | None = None
        self.num_samples = len(self._order)

        # Class images have their own order, so that all are used even with few instance images.
        self._class_configs: list[DreamBoothConfig] = []
        self._class_order: SampleOrder | None = None
        if classes:
            self._class_configs = classes.values_of_images(cfg.concept_configs)
            num_class_images = sum(concept.num_class_images for concept in cfg.concept_configs)
            count = min(len(classes), num_class_images)
            self._class_order = SampleOrder(count, cfg.seed, purpose="class order")
            # An epoch is a pass over the larger set, as in diffusers' script.
            self.num_samples = max(self.num_samples, len(self._class_order))
        self._decide_caching()

    def _decide_caching(self) -> None:
        """Decide which latents are cached, and whether data loader processes read images."""
        image_sets = [self.images]
        if self.classes is not None:
            image_sets.append(self.classes)
        varying = None  # an image with random crops
        for images in image_sets:
            for entry, size in zip(images.entries, target_sizes(self.cfg, images), strict=True):
                if varying is None and not has_one_crop(self.cfg, entry.size, size):
                    varying = entry.name

        choice = self.cfg.cache_latents
        if choice == "yes" and varying is not None:
            raise UserError(
                f"--cache_latents yes needs images that are always cropped alike, and '{varying}'"
                " is not of the shape that it is cut to: add --center_crop, or drop"
                " --cache_latents."
            )
        fits = sum(map(len, image_sets)) <= MAX_CACHED_LATENTS
        self._has_cache = choice == "yes" or (choice == "auto" and fits)
        # If all latents are cached, no image is read after the first epoch.
        self._reads_ahead = varying is not None or not self._has_cache

    def is_cached(self, sample: TrainingSample) -> bool:
        """Test that the latents of a sample are cached, for all samples with the same content."""
        original_size = sample.images.entries[sample.index].size
        return self._has_cache and has_one_crop(self.cfg, original_size, sample.size)

    def summary(self) -> str:
        """Numbers and sizes of the training images, in a few words."""
        summary = counted(len(self.images), "image")
        if self.cfg.concepts:
            concepts = self.cfg.concept_configs
            names = [concept.concept for concept in concepts]
            counts = Counter(self.images.values_of_images(names))  # images by the concept's name
            parts = []
            for concept in concepts:
                parts.append(f"{concept.concept} {counts[concept.concept]} x {concept.repeats}")
            summary += f" of {counted(len(concepts), 'concept')} ({', '.join(parts)})"
        if self.classes:
            summary += f" and {counted(len(self.classes), 'class image')}"
        sizes = sorted(set(self.sizes))
        if sizes == [(self.cfg.resolution, self.cfg.resolution)]:
            sizes_text = str(self.cfg.resolution)
        else:
            sizes_text = ", ".join(f"{height} x {width}" for height, width in sizes)
        summary += f" at {sizes_text} px"
        enlarged = 0
        for entry, size in zip(self.images.entries, self.sizes, strict=True):
            if entry.size[0] < size[0] or entry.size[1] < size[1]:
                enlarged += 1
        if enlarged:
            summary += f", {enlarged} of them smaller and enlarged"
        return summary

    def captions(self) -> list[str]:
        """All different captions that training can use."""
        texts = self._captions.all_texts()
        if self.classes or self.cfg.prior_prediction_weight:
            texts += [str(concept.class_prompt) for concept in self.cfg.concept_configs]
        if self.cfg.hold_unconditional or self.cfg.guided_target > 1:
            texts.append("")
        return list(dict.fromkeys(texts))

    def batches(
        self, schedule: Sequence[MicroBatchPlace], step_size: int
    ) -> Iterator[tuple[MicroBatchPlace, list[TrainingSample]]]:
        """Yield the samples of each (step, slots): instance samples, then as many class samples.

        Args:
            schedule: micro-batches of a process, in the order of training.
            step_size: number of slots of a step, over all processes.
        """
        loader = DataLoader(
            _Pictures(self, schedule, step_size),
            batch_size=None,  # an item has the pictures of a micro-batch
            shuffle=False,
            num_workers=self.cfg.dataloader_num_workers if self._reads_ahead else 0,
            worker_init_fn=_ignore_signals,
        )
        for place, pictures in zip(schedule, loader, strict=True):
            samples = self.samples(place, step_size)
            for sample, picture in zip(samples, pictures, strict=True):
                sample.pixels_and_mask = picture
            yield place, samples

    def samples(self, place: MicroBatchPlace, step_size: int) -> list[TrainingSample]:
        """The samples of a micro-batch; see `batches`."""
        step, slots = place
        kinds = [INSTANCE]
        if self.classes:
            kinds.append(CLASS)
        samples = []
        for kind in kinds:
            for slot in slots:
                samples.append(self.sample(step, slot, step_size, kind))
        return samples

    def sample(self, step: int, slot: int, step_size: int, kind: str) -> TrainingSample:
        """The sample of one slot of one step; ``kind`` is `INSTANCE` or `CLASS`."""
        position = step * step_size + slot
        instance_order = self._instance_order(step_size)
        if kind == INSTANCE:
            images = self.images
            index = instance_order.sample(position)
            config = self._configs[index]
            caption = self._captions.text(index, step, slot)
            size = self.sizes[index]
        else:
            assert self._class_order is not None
            assert self.classes is not None
            images = self.classes
            index = self._class_order.sample(position)
            config = self._class_configs[index]
            caption = str(config.class_prompt)
            # Class images are cropped to the size of their step's instance images, since latents of
            # a micro-batch have one size.
            size = self.sizes[instance_order.sample(step * step_size)]
        crop = sample_crop(
            images.entries[index].size,
            size,
            center_crop=self.cfg.center_crop,
            random_flip=config.random_flip,
            generator=generator(self.cfg.seed, "crop", step, index, slot, kind),
        )
        return TrainingSample(images, config, kind, index, slot, crop, size, caption)

    def _instance_order(self, step_size: int) -> SampleOrder | KindsOrder:
        """The order of the instance images; all images of a step have the same size."""
        if self._has_one_size:
            return self._order
        if self._order_by_size is None or self._order_by_size.step_size != step_size:
            self._order_by_size = KindsOrder(self.sizes, self.cfg.seed, step_size, self._repeats)
        return self._order_by_size


def _ignore_signals(_: int) -> None:
    """Ignore Ctrl-C in a data loader process: the training process handles it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Pictures(Dataset):
    """Pixels and masks of a schedule's micro-batches; None for samples with cached latents.

    They are read in data loader processes, if there are any. Only pixels are sent from there:
    samples refer to the image set, which would be sent with each of them.
    """

    def __init__(
        self, stream: TrainingStream, schedule: Sequence[MicroBatchPlace], step_size: int
    ) -> None:
        self._stream = stream
        self._schedule = schedule
        self._step_size = step_size
        # Each data loader process has its own cache.
        num_processes = max(1, stream.cfg.dataloader_num_workers)
        self._resized_images = ResizedImages(MAX_RESIZED_BYTES // num_processes)

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, number: int) -> list[PixelsAndMask | None]:
        pictures: list[PixelsAndMask | None] = []
        for sample in self._stream.samples(self._schedule[number], self._step_size):
            picture = None
            if not self._stream.is_cached(sample):
                picture = sample.read(self._resized_images)
            pictures.append(picture)
        return pictures


def centered_samples(images: ImageSet, cfg: DreamBoothConfig) -> Iterator[TrainingSample]:
    """Every image once, center-cropped and not mirrored, for the grid loss."""
    sizes = target_sizes(cfg, images)
    configs = images.values_of_images(cfg.concept_configs)
    for index, caption in enumerate(fixed_texts(cfg, images)):
        size = sizes[index]
        crop = sample_crop(
            images.entries[index].size,
            size,
            center_crop=True,
            random_flip=False,
            generator=generator("grid"),  # its numbers are not used here
        )
        yield TrainingSample(images, configs[index], GRID, index, 0, crop, size, caption)


def target_sizes(cfg: DreamBoothConfig, images: ImageSet) -> list[Size]:
    """The size of each image's crop."""
    buckets = bucket_sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    return [nearest_bucket(entry.size, buckets) for entry in images.entries]


def has_one_crop(cfg: DreamBoothConfig, size: Size, target: Size) -> bool:
    """Test that every sample of an image of this size has the same crop."""
    return cfg.center_crop or covering_size(size, target) == target
