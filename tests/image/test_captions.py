"""The text that an image is trained on: trigger word, order of tags, dropout."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.captions import (
    MAX_ORDERS,
    Captions,
    add_trigger,
    captions_or_prompts,
    fixed_texts,
)
from bilora_diffusion.image.opening import open_images

ICONS = open_images("mini", caption_column="prompt")
PLAIN = captions_or_prompts(ICONS, [None])


def captions(images: Any = ICONS, **values):
    return Captions(settings(**values), images)


class Captioned:
    """A fake image set whose captions are the given texts."""

    label = "photos"

    def __init__(self, *texts):
        self.entries = [SimpleNamespace(name=text, caption=text, concept=0) for text in texts]

    def __len__(self):
        return len(self.entries)

    def values_of_images(self, values):
        return values * len(self)


def image_set(*texts) -> Any:
    """Return a fake image set with these captions."""
    return Captioned(*texts)


def settings(**values) -> Any:
    """Return the options of a run with a single concept."""
    cfg = SimpleNamespace(
        instance_prompt=None, trigger_word=None, shuffle_tags=False, caption_dropout=0.0, seed=0
    )
    vars(cfg).update(values)
    cfg.concept_configs = [cfg]
    return cfg


def test_a_trigger_word_is_put_first_unless_the_caption_has_it():
    assert fixed_texts(settings(trigger_word="TOK"), ICONS) == PLAIN
    texts = fixed_texts(settings(trigger_word="sks"), ICONS)
    assert texts == [f"sks, {text}" for text in PLAIN]
    assert captions(trigger_word="sks").all_texts() == list(dict.fromkeys(texts))


@pytest.mark.parametrize(
    ("trigger", "text", "has_trigger"),
    [
        ("TOK", "a photo of (TOK), smiling", True),
        ("TOK", "TOKYO at night", False),
        ("cat", "a bobcat", False),
        ("ohwx man", "an ohwx mango", False),
        ("<s1>", "drawn by<s1>today", True),
        ("caf\u00e9", "un cafe\u0301, noir", True),
        ("cafe", "un cafe\u0301, noir", False),
        ("ночь", "полночь", False),
        ("a.c", "abc", False),
    ],
)
def test_a_trigger_word_counts_only_as_a_whole_word(trigger, text, has_trigger):
    assert add_trigger(text, trigger) == (text if has_trigger else f"{trigger}, {text}")


@pytest.mark.parametrize("first", ["TOK", "a photo of TOK"])
def test_the_tag_with_the_trigger_word_comes_before_the_shuffled_tags(first):
    images = image_set(f"red, {first}, sky, dog")
    texts = captions(images, trigger_word="TOK", shuffle_tags=True).all_texts()
    assert len(texts) > 1
    for text in texts:
        first_tag, *other_tags = text.split(", ")
        assert first_tag == first
        assert sorted(other_tags) == ["dog", "red", "sky"]


def test_tags_are_shuffled_and_all_texts_are_known_in_advance():
    shuffled = captions(shuffle_tags=True, trigger_word="sks")
    texts = set()
    for sample, plain in enumerate(PLAIN):
        texts_of_sample = {shuffled.text(sample, step, 0) for step in range(60)}
        assert len(texts_of_sample) == 2  # both orders of two tags
        for text in texts_of_sample:
            word, *tags = text.split(", ")
            assert word == "sks"
            assert sorted(tags) == sorted(plain.split(", "))
        texts |= texts_of_sample
    assert texts == set(shuffled.all_texts())
    reseeded = captions(shuffle_tags=True, trigger_word="sks", seed=1)
    # Another seed gives other orders.
    assert any(shuffled.text(0, step, 0) != reseeded.text(0, step, 0) for step in range(20))


def test_empty_tags_are_dropped_before_shuffling():
    texts = captions(image_set("dog, , solo,"), shuffle_tags=True).all_texts()
    assert sorted(texts) == ["dog, solo", "solo, dog"]


def test_a_caption_of_many_tags_has_a_bounded_number_of_orders():
    images = image_set(", ".join("abcdefgh"))
    assert len(captions(images, shuffle_tags=True).all_texts()) == MAX_ORDERS


def test_dropout_empties_its_share_of_captions_and_changes_no_other_draw():
    full, dropped = captions(shuffle_tags=True), captions(shuffle_tags=True, caption_dropout=0.3)
    empty_texts = 0
    for place in itertools.product(range(10), range(50), range(4)):  # samples, steps, slots
        text = dropped.text(*place)
        assert text in ("", full.text(*place))
        empty_texts += text == ""
    assert empty_texts / 2000 == pytest.approx(0.3, abs=0.04)  # four standard deviations
    assert "" in dropped.all_texts()
    assert "" not in full.all_texts()


def test_captions_without_tags_can_not_be_shuffled():
    plain = image_set("a dog", "a cat")
    with pytest.raises(UserError, match="--shuffle_tags has nothing to shuffle: no caption of ph"):
        captions(plain, shuffle_tags=True)
