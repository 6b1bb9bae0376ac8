"""The text that each image is trained on and measured with, and the embeddings of texts.

An image has its caption, else the instance prompt of its concept, with the trigger word; in
training its tags may stand in another order, or the text may be dropped. A class image has the
class prompt. Frozen text encoders embed each text once.
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
from .families.base import Conditions, Family, join_rows, split_rows
from .sets import ImageSet

MAX_ORDERS = 8
"""Orders of one image's tags; chosen beforehand, since all prompts are embedded at the start."""
MAX_TEXTS = 2000
"""Texts of all images together: an embedding takes 0.3 MB for SDXL and up to 4 MB for others."""
LIST_SUFFIX = "[]"
"""Ends the name of a list in a row, as files of tensors have it."""


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
    """The text of every image without shuffling and dropout: how held-out images are measured."""
    texts = captions_or_prompts(
        images, [concept.instance_prompt for concept in cfg.concept_configs]
    )
    trigger_words = images.of_each([concept.trigger_word for concept in cfg.concept_configs])
    return [add_trigger(text, word) for text, word in zip(texts, trigger_words, strict=True)]


def class_texts(cfg: DreamBoothConfig) -> list[str]:
    """The text of the class images of each concept."""
    return [str(concept.class_prompt) for concept in cfg.concept_configs]


class Captions:
    """The texts of a training set.

    Raises:
        UserError: an image has no text, or none has tags that could be shuffled.
    """

    def __init__(self, cfg: DreamBoothConfig, images: ImageSet) -> None:
        self._configs = images.of_each(cfg.concept_configs)  # of each image's concept
        plain = captions_or_prompts(
            images, [concept.instance_prompt for concept in cfg.concept_configs]
        )
        self._require_tags(plain, images.label)
        num_orders = max(1, min(MAX_ORDERS, MAX_TEXTS // len(plain)))
        self._texts: list[list[str]] = []  # of each image, in each order of its tags
        for sample, text in enumerate(plain):
            config = self._configs[sample]
            orders = [text]
            if config.shuffle_tags:
                orders = [self._shuffle(text, sample, order) for order in range(num_orders)]
            self._texts.append([add_trigger(order, config.trigger_word) for order in orders])

    def _require_tags(self, texts: Sequence[str], label: str) -> None:
        """Refuse to shuffle where no text has tags."""
        shuffled = []
        for text, config in zip(texts, self._configs, strict=True):
            if config.shuffle_tags:
                shuffled.append(text)
        if shuffled and not any("," in text for text in shuffled):
            raise UserError(
                f"--shuffle_tags has nothing to shuffle: no caption of {label} has tags"
                " with commas between them; drop it."
            )

    def _shuffle(self, text: str, sample: int, order: int) -> str:
        """A text with its tags in another order; those with the trigger word stay in front."""
        config = self._configs[sample]
        front, tags = [], []
        for tag in [tag.strip() for tag in text.split(",")]:
            if config.trigger_word and has_word(tag, config.trigger_word):
                front.append(tag)
            else:
                tags.append(tag)
        random = generator(config.seed, "tags", sample, order)
        permutation = torch.randperm(len(tags), generator=random).tolist()
        return ", ".join(front + [tags[place] for place in permutation])

    def all_texts(self) -> list[str]:
        """Every text that training can meet, without repetition."""
        texts = [text for orders in self._texts for text in orders]
        if any(config.caption_dropout for config in self._configs):
            texts.append("")
        return list(dict.fromkeys(texts))

    def text(self, sample: int, step: int, slot: int) -> str:
        """The text of one training sample; it depends on the seed and the sample alone."""
        config = self._configs[sample]
        random = generator(config.seed, "caption", step, sample, slot)
        # Both numbers are always drawn, so that dropout changes no order.
        dropout, order = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        if dropout < config.caption_dropout:
            return ""
        orders = self._texts[sample]
        return orders[int(order * len(orders))]


def add_trigger(text: str, trigger: str | None) -> str:
    """A caption that begins with the trigger word, unless it has it somewhere."""
    return text if not trigger or has_word(text, trigger) else f"{trigger}, {text}"


def has_word(text: str, word: str) -> bool:
    """Test that a text has a word, or several, that are not part of longer ones."""
    text = unicodedata.normalize("NFC", text)
    word = unicodedata.normalize("NFC", word)
    # Marks such as those of <s1> are an end by themselves.
    start = r"(?<!\w)" if re.match(r"\w", word) else ""
    end = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.search(start + re.escape(word) + end, text) is not None


class PromptCache:
    """Embeddings of the prompts that frozen text encoders have seen, computed once each.

    Args:
        pipeline: with its encoders.
        device: where they are moved to for the while of embedding.
        family: of the pipeline, with the run's settings; its usual ones by default.
        disk: where embeddings stay for the next run.
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
        self._pipeline, self._device = pipeline, device
        self.family = family or family_of(pipeline)
        self._disk, self._prepare = disk or DiskCache(), prepare
        self._embeddings: dict[str, Conditions] = {}

    def add(self, prompts: Sequence[str]) -> None:
        """Embed those of ``prompts`` that are new; the encoders visit the device for it only.

        Each on its own, so that the result does not depend on what else was new.
        """
        missing = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._embeddings:
                continue
            if parts := self._disk.get(prompt):  # of an earlier run
                self._embeddings[prompt] = _row_of_tensors(parts)
            else:
                missing.append(prompt)
        if not missing:
            return
        self._prepare()
        parts = [getattr(self._pipeline, name) for name in self.family.encoders]
        encoders = [encoder for encoder in parts if encoder is not None]
        for encoder in encoders:
            encoder.to(self._device)
        # One by one: batched products are rounded by the shape of the batch.
        for prompt in missing:
            (self._embeddings[prompt],) = split_rows(self.family.embed(self._pipeline, [prompt]))
            self._disk.put(_row_to_tensors(self._embeddings[prompt]), prompt)
        for encoder in encoders:
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of ``prompts`` on the CPU, in order."""
        self.add(prompts)
        return join_rows([self._embeddings[prompt] for prompt in prompts])

    def conditions(self, captions: Sequence[str]) -> Conditions:
        """Embeddings of captions as training reads them, on the CPU: an empty one is what guidance
        leads away from.
        """
        self.add(captions)
        if "" not in captions:
            return self(captions)
        # A dropped caption is embedded as the negative prompt of guidance.
        negative = self.family.negative(self._pipeline, self._embeddings[""])
        return join_rows([self._embeddings[text] if text else negative for text in captions])

    def release(self) -> None:
        """Drop the encoders, of which those of a flow model are as large as the denoiser."""
        for name in self.family.encoders:
            setattr(self._pipeline, name, None)
        gc.collect()  # models refer to themselves
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _row_to_tensors(row: Conditions) -> dict[str, Tensor]:
    """One row as tensors by name."""
    tensors: dict[str, Tensor] = {}
    for name, values in row.items():
        if isinstance(values, list):
            tensors[name + LIST_SUFFIX] = values[0]
        else:
            tensors[name] = values
    return tensors


def _row_of_tensors(tensors: dict[str, Tensor]) -> Conditions:
    """The reverse."""
    row: Conditions = {}
    for name, values in tensors.items():
        if name.endswith(LIST_SUFFIX):
            row[name.removesuffix(LIST_SUFFIX)] = [values]
        else:
            row[name] = values
    return row
