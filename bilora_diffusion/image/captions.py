"""Captions of images as they are drawn: whole, with tags in another order, or dropped."""

from __future__ import annotations

import re
import unicodedata

import torch

from ..core.errors import UserError
from ..core.seeds import generator
from .config import DreamBoothConfig
from .sets import ImageSet

ORDERS = 8
"""Orders of one image's tags; drawn beforehand, since all prompts are embedded at the start."""
MOST_TEXTS = 2000
"""Texts of all images together: an embedding takes 0.3 MB for SDXL and up to 4 MB for others."""


class Captions:
    """The texts of a training set.

    Raises:
        UserError: an image has no text, or none has tags that could be shuffled.
    """

    def __init__(self, cfg: DreamBoothConfig, images: ImageSet) -> None:
        self._own = images.of_each(cfg.each)
        plain = images.prompts(*(own.instance_prompt for own in cfg.each))
        orders = range(max(1, min(ORDERS, MOST_TEXTS // len(plain))))
        shuffled = [text for text, own in zip(plain, self._own, strict=True) if own.shuffle_tags]
        if shuffled and not any("," in text for text in shuffled):
            raise UserError(
                f"--shuffle_tags has nothing to shuffle: no caption of {images.label} has tags"
                " with commas between them; drop it."
            )
        self._texts = [
            [
                with_trigger(self._shuffled(text, i, order), own.trigger_word)
                for order in (orders if own.shuffle_tags else range(1))
            ]
            for i, (text, own) in enumerate(zip(plain, self._own, strict=True))
        ]

    def _shuffled(self, text: str, sample: int, order: int) -> str:
        own = self._own[sample]
        if not own.shuffle_tags:
            return text
        tags = [tag.strip() for tag in text.split(",")]
        trigger = own.trigger_word
        front = [tag for tag in tags if trigger and has_word(tag, trigger)]
        tags = [tag for tag in tags if tag not in front]
        random = generator(own.seed, "tags", sample, order)
        places = torch.randperm(len(tags), generator=random)
        return ", ".join([*front, *(tags[place] for place in places)])

    def every(self) -> list[str]:
        """Every text that training can meet, without repetition."""
        shown = [text for orders in self._texts for text in orders]
        dropped = any(own.caption_dropout for own in self._own)
        return list(dict.fromkeys([*shown, *([""] if dropped else [])]))

    def draw(self, sample: int, step: int, slot: int) -> str:
        """The text of one visit; it depends on the seed and the visit alone."""
        own = self._own[sample]
        random = generator(own.seed, "caption", step, sample, slot)
        dropped, order = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        if dropped < own.caption_dropout:
            return ""
        orders = self._texts[sample]
        return orders[int(order * len(orders))]


def texts(cfg: DreamBoothConfig, images: ImageSet) -> list[str]:
    """The text of every image as it is where nothing is drawn: how held-out images are measured."""
    plain = images.prompts(*(own.instance_prompt for own in cfg.each))
    triggers = images.of_each([own.trigger_word for own in cfg.each])
    return [with_trigger(text, word) for text, word in zip(plain, triggers, strict=True)]


def with_trigger(text: str, trigger: str | None) -> str:
    """A caption that begins with the trigger word, unless it has it somewhere."""
    return text if not trigger or has_word(text, trigger) else f"{trigger}, {text}"


def has_word(text: str, word: str) -> bool:
    """Test that a text has a word, or several, that are not part of longer ones."""
    text, word = (unicodedata.normalize("NFC", each) for each in (text, word))
    # Marks such as those of <s1> are an end by themselves.
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.search(before + re.escape(word) + after, text) is not None
