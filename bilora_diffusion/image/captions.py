"""The texts that images are trained and measured with, and the embeddings of texts.

An image's text is its caption or, without one, the instance prompt of its concept; an image with
neither is an error. A caption is read from ``--caption_column`` in the metadata file or table or,
in a folder without metadata, from the ``.txt`` file next to the image (see `opening`). A blank
caption counts as none. The trigger word is put in front of a text that does not contain it. In
training, the tags of a text can be shuffled, and a text can be dropped, that is, replaced by the
family's negative prompt. A class image always has the class prompt. `TrainingStream.sample` (in
`stream`) chooses the text of each sample.

Frozen text encoders embed each text once (`PromptCache`); trained ones embed texts at each step
(`loss`).
"""

from __future__ import annotations

import gc
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.seeds import generator
from .config import DreamBoothConfig
from .disk_cache import DiskCache
from .families import family_of
from .families.base import Family
from .families.tensors import Conditions, join_rows, split_rows
from .sets import ImageSet

# Maximum number of orders of an image's tags, which are chosen before training, since all prompts
# are embedded at the start.
MAX_ORDERS = 8
# Maximum number of texts with shuffled tags in total; each image has at least one. In 16 bits, an
# embedding takes 0.3 MB for SDXL, 4 MB for FLUX.1 and 13 MB for FLUX.2 klein 9B.
MAX_TEXTS = 2000
LIST_SUFFIX = "[]"  # marks the name of a list in a file of tensors


def captions_or_prompts(images: ImageSet, instance_prompts: Sequence[str | None]) -> list[str]:
    """Return the text of each image: its caption or, without one, its concept's instance prompt.

    Raises:
        UserError: an image has no caption, and its concept has no instance prompt.
    """
    texts = []
    for entry in images.entries:
        text = entry.caption or instance_prompts[entry.concept]
        if text is None:
            raise UserError(
                f"{entry.name} in {images.label} has no caption: add one, or give"
                " --instance_prompt for images without a caption."
            )
        texts.append(text)
    return texts


def fixed_texts(cfg: DreamBoothConfig, images: ImageSet) -> list[str]:
    """Return the text of each image without shuffling and dropout, as for held-out images."""
    prompts = [concept.instance_prompt for concept in cfg.concept_configs]
    texts = []
    for entry, text in zip(images.entries, captions_or_prompts(images, prompts), strict=True):
        concept = cfg.concept_configs[entry.concept]
        texts.append(add_trigger(text, concept.trigger_word))
    return texts


class Captions:
    """The texts of a training set's images, and the text of each training sample.

    Raises:
        UserError: an image has no text, or ``--shuffle_tags`` is given and no text has tags.
    """

    def __init__(self, cfg: DreamBoothConfig, images: ImageSet) -> None:
        self._configs = images.values_of_images(cfg.concept_configs)  # one for each image
        prompts = [concept.instance_prompt for concept in cfg.concept_configs]
        plain_texts = captions_or_prompts(images, prompts)
        self._require_tags(plain_texts, images.label)
        num_orders = max(1, min(MAX_ORDERS, MAX_TEXTS // len(images)))
        self._texts: list[list[str]] = []  # for each image, one per order of tags
        for sample, text in enumerate(plain_texts):
            config = self._configs[sample]
            orders = [text]
            if config.shuffle_tags:
                orders = [self._shuffle(text, config, order) for order in range(num_orders)]
            self._texts.append([add_trigger(order, config.trigger_word) for order in orders])

    def _require_tags(self, texts: Sequence[str], label: str) -> None:
        """Check that a text has tags if ``--shuffle_tags`` is given."""
        texts_to_shuffle = []
        for text, config in zip(texts, self._configs, strict=True):
            if config.shuffle_tags:
                texts_to_shuffle.append(text)
        if texts_to_shuffle and not any("," in text for text in texts_to_shuffle):
            raise UserError(
                f"--shuffle_tags has nothing to shuffle: no caption of {label} has tags"
                " separated by commas; drop the option."
            )

    def _shuffle(self, text: str, config: DreamBoothConfig, order: int) -> str:
        """Return a text with its tags in another order; tags with the trigger word come first.

        Args:
            order: number of the order, which with the seed and the text gives the permutation.
        """
        front_tags = []
        tags = []
        for part in text.split(","):
            tag = part.strip()
            if not tag:  # after a trailing comma
                continue
            if config.trigger_word and has_word(tag, config.trigger_word):
                front_tags.append(tag)
            else:
                tags.append(tag)
        random = generator(config.seed, "tags", text, order)
        permutation = torch.randperm(len(tags), generator=random).tolist()
        return ", ".join(front_tags + [tags[place] for place in permutation])

    def all_texts(self) -> list[str]:
        """Return all distinct texts that training can use."""
        texts: list[str] = []
        for orders in self._texts:
            texts += orders
        if any(config.caption_dropout for config in self._configs):
            texts.append("")
        return list(dict.fromkeys(texts))

    def text(self, sample: int, step: int, slot: int) -> str:
        """Return the text of a training sample, chosen by the seed, the step and the slot."""
        config = self._configs[sample]
        random = generator(config.seed, "caption", step, sample, slot)
        # Always draw two numbers, so that dropout does not change the order of tags.
        dropout, order = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        if dropout < config.caption_dropout:
            return ""
        orders = self._texts[sample]
        return orders[int(order * len(orders))]


def add_trigger(text: str, trigger: str | None) -> str:
    """Return a caption with the trigger word in front, unless the caption contains it."""
    if not trigger or has_word(text, trigger):
        return text
    return f"{trigger}, {text}"


def concept_words(trigger_word: str | None, instance_prompt: str | None) -> str | None:
    """Return the words that name a concept in a prompt: its trigger word or instance prompt."""
    return trigger_word or instance_prompt


def has_word(text: str, word: str) -> bool:
    """Return whether a text contains a word or phrase, but not as part of a longer word."""
    # An accented letter can be one character or two; normalization makes it one.
    text = unicodedata.normalize("NFC", text)
    word = unicodedata.normalize("NFC", word)
    # A word that begins with punctuation, such as <s1>, may directly follow a letter.
    start = r"(?<!\w)" if re.match(r"\w", word) else ""
    end = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.search(start + re.escape(word) + end, text) is not None


class PromptCache:
    """Embeddings of prompts by frozen text encoders, each computed once.

    Args:
        pipeline: a pipeline with its text encoders.
        device: device to which the encoders are moved while they embed prompts.
        family: the pipeline's family with the run's settings; None for the default settings.
        disk: cache on disk, for later runs; None if prompts are not cached on disk.
        prepare: function that is called before the encoders are used.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        family: Family | None = None,
        disk: DiskCache | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._pipeline = pipeline
        self._device = device
        self.family = family or family_of(pipeline)
        self._disk = disk or DiskCache()
        self._prepare = prepare
        self._embeddings: dict[str, Conditions] = {}

    def add(self, prompts: Sequence[str]) -> None:
        """Embed the prompts that are not in the cache.

        Each prompt is embedded alone, so its embedding does not depend on the other prompts.
        """
        missing = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._embeddings:
                continue
            tensors = self._disk.get(prompt)  # from an earlier run
            if tensors:
                self._embeddings[prompt] = _row_from_tensors(tensors)
            else:
                missing.append(prompt)
        if not missing:
            return

        self._prepare()
        encoders = []
        for name in self.family.encoders:
            encoder = getattr(self._pipeline, name)
            if encoder is not None:  # None if the pipeline lacks an optional one
                encoders.append(encoder)
        for encoder in encoders:
            encoder.to(self._device)
        # One at a time, since the rounding of batched products depends on the shape of the batch.
        for prompt in missing:
            (row,) = split_rows(self.family.embed(self._pipeline, [prompt]))
            self._embeddings[prompt] = row
            self._disk.put(_row_to_tensors(row), prompt)
        for encoder in encoders:
            encoder.to("cpu")

    def embed(self, prompts: Sequence[str]) -> Conditions:
        """Return the embeddings of prompts, n rows on the CPU; "" is embedded as an empty text."""
        self.add(prompts)
        return join_rows([self._embeddings[prompt] for prompt in prompts])

    def embed_captions(self, captions: Sequence[str]) -> Conditions:
        """Return the embeddings of captions, n rows on the CPU; "" is a dropped caption.

        A dropped caption gets the embedding of guidance's negative prompt (`Family.negative`), for
        example zeros.
        """
        self.add(captions)
        if "" not in captions:
            return self.embed(captions)
        negative_row = self.family.negative(self._pipeline, self._embeddings[""])
        rows = [self._embeddings[text] if text else negative_row for text in captions]
        return join_rows(rows)

    def release(self) -> None:
        """Delete the text encoders, which in flow models can be as large as the denoiser."""
        for name in self.family.encoders:
            setattr(self._pipeline, name, None)
        gc.collect()  # models contain reference cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _row_to_tensors(row: Conditions) -> dict[str, Tensor]:
    """Return a row of embeddings as named tensors; the name of a one-item list ends in "[]"."""
    tensors: dict[str, Tensor] = {}
    for name, values in row.items():
        if isinstance(values, list):
            tensors[name + LIST_SUFFIX] = values[0]
        else:
            tensors[name] = values
    return tensors


def _row_from_tensors(tensors: dict[str, Tensor]) -> Conditions:
    """Return the row of embeddings of named tensors, the reverse of `_row_to_tensors`."""
    row: Conditions = {}
    for name, values in tensors.items():
        if name.endswith(LIST_SUFFIX):
            row[name.removesuffix(LIST_SUFFIX)] = [values]
        else:
            row[name] = values
    return row
