"""The text that each image is trained on and measured with.

An image has its caption, else the instance prompt of its concept, with the trigger word; in
training its tags may stand in another order, or the text may be dropped. A class image has the
class prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch

from ..core.errors import UserError
from ..core.seeds import generator
from .config import DreamBoothConfig
from .sets import ImageSet

MAX_ORDERS = 8
"""Orders of one image's tags; chosen beforehand, since all prompts are embedded at the start."""
MAX_TEXTS = 2000
"""Texts of all images together: an embedding takes 0.3 MB for SDXL and up to 4 MB for others."""


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
