"""The training stream of DreamBooth: the order of the images, with their crops and captions."""

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

# The number of a step, and the positions (slots) of a micro-batch within the step's batch.
MicroBatchPlace = tuple[int, tuple[int, ...]]
# Pixels, (3, H, W) in [-1, 1], and mask, (1, H, W) in [0, 1] or None.
PixelsAndMask = tuple[Tensor, Tensor | None]
# With ``--cache_latents auto``, latents are cached only if there are at most this many images.
MAX_CACHED_LATENTS = 2000
# Maximum size in bytes of all resized images that a training process or its data loaders cache.
MAX_RESIZED_BYTES = 10**9
# Kinds of samples: an instance image, a class image, and an image that is only measured.
INSTANCE, CLASS, GRID = "instance", "class", "grid"


@dataclass
class TrainingSample:
    """An image with a crop and a caption, for training or for a measurement.

    Args:
        images: the image set.
        cfg: configuration of the image's concept.
        kind: `INSTANCE`, `CLASS` or `GRID`.
        index: index of the image in the set.
        slot: position within the step's batch; 0 for `GRID`.
        crop: position and flip of the crop.
        size: (height, width) of the crop, in pixels.
        caption: the text that the image is trained on or measured with.
        pixels_and_mask: result of `read` if the data loader has read the image; otherwise None.
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
        """Key of the sample's pixels, equal in all runs for the same file, mask, crop and size."""
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
        """Return the pixels, (3, H, W) in [-1, 1], and the mask, (1, H, W) in [0, 1] or None.

        The file is read unless the data loader has already read it, or its resized image is cached.

        Args:
            resized_images: cache of resized images; None to cache nothing.
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
        """Return a hash of the sample's data and of ``noise``, the hash of its noise and level."""
        # Sizes differ only with buckets.
        size = self.size if self.cfg.aspect_ratio_buckets else ()
        place = repr((self.kind, self.index, *self.crop, *size))
        return digest_texts([self.images.fingerprint(), place, self.caption, noise])


class TrainingStream:
    """The order, crops and captions of the images.

    They depend on the seed, the data, the options of the images and the size of a step, but not on
    the method or on the number of processes.

    Args:
        cfg: configuration of the run.
        images: the instance images.
        classes: the class images; None if there is no prior preservation.

    Raises:
        UserError: an image has neither a caption nor an instance prompt, there are no tags to
            shuffle, or the latents can't be cached as requested.
    """

    def __init__(
        self, cfg: DreamBoothConfig, images: ImageSet, classes: ImageSet | None = None
    ) -> None:
        self.cfg = cfg
        self.images = images
        self.classes = classes
        self._captions = Captions(cfg, images)
        self.sizes = target_sizes(cfg, images)
        self._has_one_size = len(set(self.sizes)) == 1  # always true without buckets
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
        varying = None  # name of an image with random crops
        for images in image_sets:
            for entry, size in zip(images.entries, target_sizes(self.cfg, images), strict=True):
                if varying is None and not has_one_crop(self.cfg, entry.size, size):
                    varying = entry.name

        choice = self.cfg.cache_latents
        if choice == "yes" and varying is not None:
            raise UserError(
                f"--cache_latents yes needs images that always have the same crop, but '{varying}'"
                " does not have the shape of its crop: add --center_crop, or drop --cache_latents."
            )
        fits = sum(map(len, image_sets)) <= MAX_CACHED_LATENTS
        self._has_cache = choice == "yes" or (choice == "auto" and fits)
        # If all latents are cached, an image is read only until each of its crops (with
        # --random_flip, also the mirrored one) is in the cache.
        self._reads_ahead = varying is not None or not self._has_cache

    def is_cached(self, sample: TrainingSample) -> bool:
        """Return whether a sample's latents are encoded once for all samples with its content."""
        original_size = sample.images.entries[sample.index].size
        return self._has_cache and has_one_crop(self.cfg, original_size, sample.size)

    def summary(self) -> str:
        """Describe the numbers and sizes of the training images in a few words."""
        summary = counted(len(self.images), "image")
        if self.cfg.concepts:
            concepts = self.cfg.concept_configs
            names = [concept.concept for concept in concepts]
            counts = Counter(self.images.values_of_images(names))  # images per concept
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
        """Return all distinct captions that training can use."""
        texts = self._captions.all_texts()
        if self.classes or self.cfg.prior_prediction_weight:
            texts += [str(concept.class_prompt) for concept in self.cfg.concept_configs]
        if self.cfg.hold_unconditional or self.cfg.guided_target > 1:
            texts.append("")
        return list(dict.fromkeys(texts))

    def batches(
        self, schedule: Sequence[MicroBatchPlace], step_size: int
    ) -> Iterator[tuple[MicroBatchPlace, list[TrainingSample]]]:
        """Yield each micro-batch's place and samples: instance samples, then any class samples.

        Args:
            schedule: places of the micro-batches of one process, in the order of training.
            step_size: number of slots in a step, over all processes.
        """
        loader = DataLoader(
            _Pictures(self, schedule, step_size),
            batch_size=None,  # each item is already a whole micro-batch
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
        """Return the samples of a micro-batch; see `batches`."""
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
        """Return the sample of a step's slot; ``kind`` is `INSTANCE` or `CLASS`."""
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
            # Class images are cropped to the size of the step's instance images, since all latents
            # of a micro-batch have the same size.
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
        """Return the order of the instance images; all images of a step have the same size."""
        if self._has_one_size:
            return self._order
        if self._order_by_size is None or self._order_by_size.step_size != step_size:
            self._order_by_size = KindsOrder(self.sizes, self.cfg.seed, step_size, self._repeats)
        return self._order_by_size


def _ignore_signals(_: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a data loader process: the training process handles them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Pictures(Dataset):
    """A data set of micro-batches: each sample's pixels and mask, or None if latents are cached.

    If there are data loader processes, they read the images. They return pixels and masks,
    not samples, since each sample would bring its image set along.
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
    """Yield each image once, center-cropped and not mirrored, for measurements."""
    sizes = target_sizes(cfg, images)
    configs = images.values_of_images(cfg.concept_configs)
    for index, caption in enumerate(fixed_texts(cfg, images)):
        size = sizes[index]
        crop = sample_crop(
            images.entries[index].size,
            size,
            center_crop=True,
            random_flip=False,
            generator=generator("grid"),  # not used: these crops are not random
        )
        yield TrainingSample(images, configs[index], GRID, index, 0, crop, size, caption)


def target_sizes(cfg: DreamBoothConfig, images: ImageSet) -> list[Size]:
    """Return the size of each image's crop."""
    buckets = bucket_sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    return [nearest_bucket(entry.size, buckets) for entry in images.entries]


def has_one_crop(cfg: DreamBoothConfig, size: Size, target: Size) -> bool:
    """Return whether all samples of an image of this size are cropped at the same position."""
    return cfg.center_crop or covering_size(size, target) == target
