"""What the Compare tab shows, as data and as HTML."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qsl

import pytest
from PIL import Image

from app import compare_html, pictures
from app.compare_data import (
    ORDERS,
    arranged,
    best,
    find,
    first_view,
    link,
    metrics,
    neighbour,
    opened,
    rows,
    times_100,
)
from app.scored import Prompt, Scored, ScoredImage
from eval.table import Summary
from tests.app.scored_images import scores_of

LABELS = ("lora", "bilora", "base, plain")
# prompt -> seed -> i2t of the first and the second adapter
I2T = {0: {0: (0.30, 0.32), 1: (0.30, 0.30)}, 1: {0: (0.40, 0.35)}, 2: {0: (0.20, 0.29)}}


def image(adapter: int, prompt: int, seed: int, **scores: float) -> ScoredImage:
    return ScoredImage(adapter, prompt, seed, f"{adapter}-{prompt}-{seed}.png", scores)


@pytest.fixture
def result() -> Scored:
    """Three prompts, up to two seeds, three adapters of which the last has no scores."""
    images = [
        image(adapter, prompt, seed, i2t=value, nearest=value)
        for prompt, seeds in I2T.items()
        for seed, values in seeds.items()
        for adapter, value in enumerate(values)
    ]
    images += [image(2, prompt, 0) for prompt in I2T]
    names = ("rabbit", "Cloud", "lion")
    prompts = [Prompt(f"an icon of a {name}", name) for name in names]
    return scores_of(LABELS, prompts, images, scorer="mini-CLIP")


def test_a_change_is_the_mean_over_common_seeds(result: Scored) -> None:
    listed = rows(result, 0, 1, "i2t")
    assert [row.prompt for row in listed] == [0, 1, 2]
    assert [row.change for row in listed] == pytest.approx([0.01, -0.05, 0.09])
    assert rows(result, 0, 0, "i2t")[0].change == 0


def test_a_seed_of_one_adapter_alone_does_not_count(result: Scored) -> None:
    lonely = image(1, 1, 1, i2t=0.99)
    listed = rows(replace(result, images=[*result.images, lonely]), 0, 1, "i2t")
    assert listed[1].b == pytest.approx(0.35)


def test_a_missing_score_is_none_and_comes_last(result: Scored) -> None:
    listed = rows(result, 0, 2, "i2t")
    assert all(row.change is None and row.b is None for row in listed)
    images = [one for one in result.images if (one.adapter, one.prompt) != (1, 2)]
    for order in ("gain", "loss"):
        listed = arranged(rows(replace(result, images=images), 0, 1, "i2t"), "i2t", order)
        assert listed[-1].prompt == 2


@pytest.mark.parametrize(
    ("metric", "order", "expected"),
    [
        ("i2t", "gain", [2, 0, 1]),
        ("i2t", "loss", [1, 0, 2]),
        ("i2t", "name", [1, 2, 0]),
        ("i2t", "list", [0, 1, 2]),
        ("nearest", "gain", [1, 0, 2]),  # less memorization is the gain
        ("nearest", "loss", [2, 0, 1]),
    ],
)
def test_orders(result: Scored, metric: str, order: str, expected: list[int]) -> None:
    assert order in ORDERS
    listed = arranged(rows(result, 0, 1, metric), metric, order)
    assert [row.prompt for row in listed] == expected


def test_the_filter_takes_all_words_in_any_case(result: Scored) -> None:
    found = rows(result, 0, 1, "i2t")
    assert [row.prompt for row in arranged(found, "i2t", "list", "ICON cloud")] == [1]
    assert arranged(found, "i2t", "list", "cloud lion") == []


def test_steps_stop_at_both_ends(result: Scored) -> None:
    listed = arranged(rows(result, 0, 1, "i2t"), "i2t", "gain")  # 2, 0, 1
    assert neighbour(listed, 2, 1) == 0
    assert neighbour(listed, 2, -1) == 2
    assert neighbour(listed, 1, 1) == 1
    assert neighbour(listed[:1], 1, 1) == 2  # filtered away: the list's first
    assert neighbour([], 1, 1) == 1


def test_only_scores_that_an_image_has_are_offered(result: Scored) -> None:
    assert metrics(result) == ["i2t", "nearest"]


def test_the_best_score_is_marked_and_a_tie_is_not(result: Scored) -> None:
    pair = [one for at in (0, 1) if (one := find(result, at, 2, 0))]
    assert best(pair) == {"i2t": 0.29, "nearest": 0.20}
    assert best(pair[:1] * 2) == {}
    assert find(result, 2, 0, 1) is None


def test_scores_are_shown_times_100() -> None:
    assert [times_100(value) for value in (0.31417, -0.005, 0.0, None)] == [
        "31.42",
        "-0.50",
        "0.00",
        "–",
    ]


def test_a_link_reopens_its_view(result: Scored) -> None:
    view = replace(
        first_view("scores", result), a=1, b=0, also=(2,), prompt=1, seed=1, order="name", words="n"
    )
    query = link(view, result)
    assert query.startswith("?scores=scores&a=bilora&b=lora&also=base%2C+plain&prompt=")
    assert opened(dict(parse_qsl(query[1:])), "scores", result) == (view, [])
    assert first_view("scores", result) == opened({}, "scores", result)[0]


def test_a_link_survives_another_order_of_prompts(result: Scored) -> None:
    query = dict(parse_qsl(link(replace(first_view("s", result), prompt=2), result)[1:]))
    turned = replace(result, prompts=result.prompts[::-1])
    assert opened(query, "s", turned)[0].prompt == 0


def test_what_a_link_names_in_vain_is_said(result: Scored) -> None:
    query = {"a": "lora-2", "prompt": "gone", "seed": "x", "metric": "t2t", "order": "up"}
    view, missing = opened(query, "scores", result)
    first = first_view("scores", result)
    assert (view.a, view.prompt, view.seed, view.metric, view.order) == (
        first.a,
        first.prompt,
        first.seed,
        first.metric,
        first.order,
    )
    assert len(missing) == 5
    assert '"lora-2"' in missing[0]


def test_a_result_with_one_adapter_or_no_image_can_be_opened(result: Scored) -> None:
    alone = replace(result, images=[one for one in result.images if one.adapter == 1])
    assert first_view("s", alone).adapters == (1,)
    empty = replace(result, images=[], seeds=[])
    assert first_view("s", empty).prompt == 0


def test_html_holds_scores_and_no_foreign_markup(result: Scored) -> None:
    evil = "<img src=x onerror=alert(1)>"
    scores = {"i2t": 0.3142, "nearest": 0.5}
    drawn = ScoredImage(0, 0, 0, "x.png", scores, caption=evil, nearest_image=evil)
    cards = compare_html.cards(result, [compare_html.Card(evil, None, drawn, role="A")])
    prompt = replace(result.prompts[0], text=evil, instance=evil)
    listed = rows(replace(result, prompts=[prompt, *result.prompts[1:]]), 0, 1, "i2t")
    text = compare_html.prompt_list(listed, 0, "i2t", evil, evil)
    for html in (cards, text, compare_html.heading(evil)):
        assert "<img src=x" not in html
    assert "31.42" in cards
    assert "mini-CLIP" in cards
    assert "+1.00" in text
    assert text.count("aria-current") == 1


def test_a_difference_that_chance_explains_has_no_colour(result: Scored) -> None:
    def tone(*gains: float) -> str:
        images = [
            image(adapter, 0, seed, i2t=0.3 + adapter * gain)
            for seed, gain in enumerate(gains)
            for adapter in (0, 1)
        ]
        listed = rows(replace(result, images=images, seeds=list(range(len(gains)))), 0, 1, "i2t")
        html = compare_html.prompt_list(listed, 0, "i2t", "a", "b")
        return html.split('class="')[-1].split('"')[0]

    assert tone(0.5) == "even", "one seed says nothing"
    assert tone(0.1, -0.09, 0.1) == "even"
    assert tone(0.1, 0.11, 0.09) == "up"
    assert tone(-0.1, -0.11, -0.09) == "down"


def test_means_with_the_difference_of_the_pair(result: Scored) -> None:
    def made(low: float, high: float) -> str:
        means = [Summary(LABELS[at], "i2t", mean=0.3 + 0.02 * at) for at in (0, 1)]
        ends = {"difference_low": low, "difference_high": high}
        means[1] = replace(means[1], control=LABELS[0], difference=0.02, higher=1, **ends)
        both = replace(result, summaries=means)
        return compare_html.summary(both, 0, 1) + compare_html.summary(both, 1, 0)

    html = made(0.01, 0.03)
    assert '<td class="up">+2.00 (+1.00 to +3.00)</td>' in html
    assert '<td class="down">-2.00 (-3.00 to -1.00)</td>' in html
    assert html.count('class="even"') == 0
    assert made(-0.01, 0.05).count('class="even"') == 2
    assert compare_html.summary(result, 0, 1) == ""


def test_small_pictures_are_enlarged_and_large_ones_reduced() -> None:
    assert pictures.fitted(Image.new("RGB", (64, 32))).size == (256, 128)
    assert pictures.fitted(Image.new("RGB", (300, 200))).size == (300, 200)
    assert pictures.fitted(Image.new("RGB", (1536, 1024))).size == (768, 512)
    assert pictures.data_uri(Image.new("RGB", (64, 64))).startswith("data:image/webp;base64,")
