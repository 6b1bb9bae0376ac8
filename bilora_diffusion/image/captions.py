"""The text that each image is trained on and measured with, and the embeddings of texts.

An image has its caption, else the instance prompt of its concept; without both it is an error. A
caption is the text of ``--caption_column`` in the metadata file or table, or, in a folder without
metadata, of the ``.txt`` file beside the image; a blank one counts as none (`opening` reads them).
The trigger word comes in front if the text does not have it. In training the tags can be shuffled,
or the text can be dropped, for which the family's negative stands. A class image has the class
prompt.

Frozen text encoders embed each text once (`PromptCache`, by the family's `embed`), trained ones at
each step (`loss`).
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

# Orders of one image's tags. They are chosen beforehand: all prompts are embedded at the start.
MAX_ORDERS = 8
# Texts of all images together: an embedding takes 0.3 MB for SDXL and up to 4 MB for others.
MAX_TEXTS = 2000
LIST_SUFFIX = "[]"  # ends the name of a list in a file of tensors


def captions_or_prompts(images: ImageSet, instance_prompts: Sequence[str | None]) -> list[str]:
    """The text of every image: its caption, else the instance prompt of its concept.

    Raises:
        UserError: an image has no caption and there is no instance prompt.
    """
    texts = []
    for entry in images.entries:
        text = entry.caption or instance_prompts[entry.concept]
        if text is None:
            raise UserError(
                f"{entry.name} in {images.label} has no caption: give it one, or give"
                " --instance_prompt for the images without."
            )
        texts.append(text)
    return texts


def fixed_texts(cfg: DreamBoothConfig, images: ImageSet) -> list[str]:
    """The text of every image without shuffling and dropout, as held-out images are measured."""
    prompts = [concept.instance_prompt for concept in cfg.concept_configs]
    texts = []
    for entry, text in zip(images.entries, captions_or_prompts(images, prompts), strict=True):
        concept = cfg.concept_configs[entry.concept]
        texts.append(add_trigger(text, concept.trigger_word))
    return texts


class Captions:
    """The texts of a training set: those of each image, and the text of each training sample.

    Raises:
        UserError: an image has no text, or none has tags that could be shuffled.
    """

    def __init__(self, cfg: DreamBoothConfig, images: ImageSet) -> None:
        self._configs = images.values_of_images(cfg.concept_configs)  # of each image's concept
        prompts = [concept.instance_prompt for concept in cfg.concept_configs]
        plain_texts = captions_or_prompts(images, prompts)
        self._require_tags(plain_texts, images.label)
        num_orders = max(1, min(MAX_ORDERS, MAX_TEXTS // len(images)))
        self._texts: list[list[str]] = []  # of each image, in each order of its tags
        for sample, text in enumerate(plain_texts):
            config = self._configs[sample]
            orders = [text]
            if config.shuffle_tags:
                orders = [self._shuffle(text, config, order) for order in range(num_orders)]
            self._texts.append([add_trigger(order, config.trigger_word) for order in orders])

    def _require_tags(self, texts: Sequence[str], label: str) -> None:
        """Refuse ``--shuffle_tags`` where no text has tags."""
        texts_to_shuffle = []
        for text, config in zip(texts, self._configs, strict=True):
            if config.shuffle_tags:
                texts_to_shuffle.append(text)
        if texts_to_shuffle and not any("," in text for text in texts_to_shuffle):
            raise UserError(
                f"--shuffle_tags has nothing to shuffle: no caption of {label} has tags"
                " with commas between them; drop it."
            )

    def _shuffle(self, text: str, config: DreamBoothConfig, order: int) -> str:
        """A text with its tags in another order; those with the trigger word stay in front.

        Args:
            order: number of the order, which decides the permutation together with seed and text.
        """
        front_tags = []
        tags = []
        for part in text.split(","):
            tag = part.strip()
            if not tag:  # after a comma at the end
                continue
            if config.trigger_word and has_word(tag, config.trigger_word):
                front_tags.append(tag)
            else:
                tags.append(tag)
        random = generator(config.seed, "tags", text, order)
        permutation = torch.randperm(len(tags), generator=random).tolist()
        return ", ".join(front_tags + [tags[place] for place in permutation])

    def all_texts(self) -> list[str]:
        """All different texts that training can use."""
        texts: list[str] = []
        for orders in self._texts:
            texts += orders
        if any(config.caption_dropout for config in self._configs):
            texts.append("")
        return list(dict.fromkeys(texts))

    def text(self, sample: int, step: int, slot: int) -> str:
        """The text of one training sample, chosen by seed, step and slot."""
        config = self._configs[sample]
        random = generator(config.seed, "caption", step, sample, slot)
        # Two numbers whatever the options, so that dropout does not change the order of tags.
        dropout, order = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        if dropout < config.caption_dropout:
            return ""
        orders = self._texts[sample]
        return orders[int(order * len(orders))]


def add_trigger(text: str, trigger: str | None) -> str:
    """Put the trigger word in front of a caption that does not contain it."""
    if not trigger or has_word(text, trigger):
        return text
    return f"{trigger}, {text}"


def concept_words(trigger_word: str | None, instance_prompt: str | None) -> str | None:
    """The words that name a concept in a prompt: its trigger word, else its instance prompt."""
    return trigger_word or instance_prompt


def has_word(text: str, word: str) -> bool:
    """Test that a text contains a word or a phrase, not as a part of a longer word."""
    # An accented letter can be one character or two: normalize it to one.
    text = unicodedata.normalize("NFC", text)
    word = unicodedata.normalize("NFC", word)
    # A word that begins with a mark, such as <s1>, may follow a letter.
    start = r"(?<!\w)" if re.match(r"\w", word) else ""
    end = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.search(start + re.escape(word) + end, text) is not None


class PromptCache:
    """Embeddings of prompts by frozen text encoders, each computed once.

    Args:
        pipeline: with its encoders.
        device: the encoders are moved to it to embed prompts.
        family: the pipeline's family with the run's settings; by default with its usual settings.
        disk: cache on disk, for the next run.
        prepare: called before the encoders are used.
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
        """Embed the prompts that are new.

        Each prompt is embedded by itself, so that the result does not depend on the other new ones.
        """
        missing = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._embeddings:
                continue
            tensors = self._disk.get(prompt)  # of an earlier run
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
            if encoder is not None:  # some pipelines lack one
                encoders.append(encoder)
        for encoder in encoders:
            encoder.to(self._device)
        # One by one: how batched products are rounded depends on the shape of the batch.
        for prompt in missing:
            (row,) = split_rows(self.family.embed(self._pipeline, [prompt]))
            self._embeddings[prompt] = row
            self._disk.put(_row_to_tensors(row), prompt)
        for encoder in encoders:
            encoder.to("cpu")

    def embed(self, prompts: Sequence[str]) -> Conditions:
        """Embed prompts as they are, "" too: n rows in their order, on the CPU."""
        self.add(prompts)
        return join_rows([self._embeddings[prompt] for prompt in prompts])

    def embed_captions(self, captions: Sequence[str]) -> Conditions:
        """Embed captions for training, where "" is guidance's negative prompt: n rows on the CPU.

        A family can embed the negative prompt in another way than the empty prompt, such as by
        zeros (`Family.negative`).
        """
        self.add(captions)
        if "" not in captions:
            return self.embed(captions)
        negative_row = self.family.negative(self._pipeline, self._embeddings[""])
        rows = [self._embeddings[text] if text else negative_row for text in captions]
        return join_rows(rows)

    def release(self) -> None:
        """Delete the encoders, which are as large as the denoiser in flow models."""
        for name in self.family.encoders:
            setattr(self._pipeline, name, None)
        gc.collect()  # models have reference cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _row_to_tensors(row: Conditions) -> dict[str, Tensor]:
    """One row of embeddings as tensors by name; a list of one has a name that ends in "[]"."""
    tensors: dict[str, Tensor] = {}
    for name, values in row.items():
        if isinstance(values, list):
            tensors[name + LIST_SUFFIX] = values[0]
        else:
            tensors[name] = values
    return tensors


def _row_from_tensors(tensors: dict[str, Tensor]) -> Conditions:
    """The reverse of `_row_to_tensors`."""
    row: Conditions = {}
    for name, values in tensors.items():
        if name.endswith(LIST_SUFFIX):
            row[name.removesuffix(LIST_SUFFIX)] = [values]
        else:
            row[name] = values
    return row
