"""What is told of an image at each visit: trigger word, order of tags, dropout."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.captions import ORDERS, Captions, texts, with_trigger
from bilora_diffusion.image.opening import open_images

ICONS = open_images("mini", caption_column="prompt")


def captions(images: Any = ICONS, **values):
    return Captions(settings(**values), images)


def settings(**values) -> Any:
    options = {"trigger_word": None, "shuffle_tags": False, "caption_dropout": 0.0, "seed": 0}
    cfg = SimpleNamespace(**{"instance_prompt": None, **options, **values})
    return SimpleNamespace(**vars(cfg), each=[cfg])


def test_a_trigger_word_comes_first_unless_it_is_there():
    assert texts(settings(trigger_word="TOK"), ICONS) == ICONS.prompts(None)
    told = texts(settings(trigger_word="sks"), ICONS)
    assert told == [f"sks, {text}" for text in ICONS.prompts(None)]
    assert captions(trigger_word="sks").every() == list(dict.fromkeys(told))


@pytest.mark.parametrize(
    ("trigger", "text", "there"),
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
def test_a_trigger_word_inside_of_another_is_none(trigger, text, there):
    assert with_trigger(text, trigger) == (text if there else f"{trigger}, {text}")


@pytest.mark.parametrize("first", ["TOK", "a photo of TOK"])
def test_a_trigger_word_that_a_caption_has_stays_in_front_of_shuffled_tags(first):
    prompts = [f"red, {first}, sky, dog"]
    tagged = SimpleNamespace(label="x", prompts=lambda _: prompts, of_each=list)
    orders = captions(tagged, trigger_word="TOK", shuffle_tags=True).every()
    assert {text.split(", ")[0] for text in orders} == {first}
    assert {tuple(sorted(text.split(", "))) for text in orders} == {
        tuple(sorted([first, "red", "dog", "sky"]))
    }
    assert len(orders) > 1


def test_tags_are_shuffled_and_all_texts_are_known_beforehand():
    drawn = captions(shuffle_tags=True, trigger_word="sks")
    met = {drawn.draw(sample, step, 0) for sample in range(len(ICONS)) for step in range(60)}
    assert met == set(drawn.every())
    for sample, plain in enumerate(ICONS.prompts(None)):
        word, *tags = drawn.draw(sample, 0, 0).split(", ")
        assert word == "sks"
        assert sorted(tags) == sorted(plain.split(", "))
    assert len(met) == 2 * len(ICONS)  # two tags each
    assert len(drawn.every()) <= ORDERS * len(ICONS)
    other = captions(shuffle_tags=True, trigger_word="sks", seed=1)
    assert [drawn.draw(0, step, 0) for step in range(20)] != [
        other.draw(0, step, 0) for step in range(20)
    ]


def test_dropout_leaves_its_share_empty_and_changes_no_other_draw():
    full, dropped = captions(shuffle_tags=True), captions(shuffle_tags=True, caption_dropout=0.3)
    visits = [(i, step, slot) for i in range(10) for step in range(50) for slot in range(4)]
    pairs = [(full.draw(*visit), dropped.draw(*visit)) for visit in visits]
    empty = Counter(text == "" for _, text in pairs)[True]
    assert empty / len(pairs) == pytest.approx(0.3, abs=0.04)  # four standard deviations
    assert all(text in ("", whole) for whole, text in pairs)
    assert "" in dropped.every()
    assert "" not in full.every()


def test_what_has_no_tags_is_refused():
    plain = SimpleNamespace(
        label="photos", prompts=lambda _: ["a dog", "a cat"], of_each=lambda own: own * 2
    )
    with pytest.raises(UserError, match="--shuffle_tags has nothing to shuffle: no caption of ph"):
        captions(plain, shuffle_tags=True)
