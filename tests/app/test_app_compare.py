"""Data and HTML of the Compare tab."""

from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import parse_qsl

import gradio as gr
import pytest

from app import compare, parts
from app import scores as data
from app.catalog import Catalog
from app.scores import Key, ScoredImage
from eval.clip_scores.prompts import Prompt
from tests.app.folders import scores_of, write

LORA, BILORA, BASE = LABELS = ("lora", "bilora", "base, plain")
RABBIT, CLOUD, LION = "an icon of a rabbit", "an icon of a Cloud", "an icon of a lion"
PROMPTS = [Prompt(RABBIT, "rabbit"), Prompt(CLOUD, "Cloud"), Prompt(LION, "lion")]
# Prompt -> seed -> scores of the first and second adapters
I2T = {
    RABBIT: {0: (0.30, 0.32), 1: (0.30, 0.30)},
    CLOUD: {0: (0.40, 0.35)},
    LION: {0: (0.20, 0.29)},
}
VIEW = data.View("scores", LORA, BILORA, (), RABBIT, 0, "i2t")


def make_scores(i2t):
    """Return scores of two adapters, and of the base model, whose images have no scores."""
    images: dict[Key, ScoredImage] = {}
    for text, seeds in i2t.items():
        for seed, values in seeds.items():
            for label, value in zip(LABELS, values, strict=False):
                scores = {"i2t": value, "nearest": value}
                images[label, text, seed] = ScoredImage(f"{label}-{text}-{seed}.png", scores)
        images[BASE, text, 0] = ScoredImage("base.png", {})
    return scores_of(LABELS, PROMPTS, images, (0, 1))


@pytest.fixture
def result():
    return make_scores(I2T)


def test_a_change_is_a_mean_over_common_seeds_and_prompts_without_one_are_last(result):
    assert data.measured_metrics(result) == ["i2t", "nearest"]
    rows = data.compare_prompts(result, LORA, BILORA, "i2t")
    assert [row.text for row in rows] == [RABBIT, CLOUD, LION]
    assert [row.change for row in rows] == pytest.approx([0.01, -0.05, 0.09])
    assert data.compare_prompts(result, LORA, LORA, "i2t")[0].change == 0
    for row in data.compare_prompts(result, LORA, BASE, "i2t"):
        assert (row.b, row.change) == (None, None)
    # Only one adapter has a score for seed 7.
    with_lone_seed = make_scores(I2T | {RABBIT: I2T[RABBIT] | {7: (0.9,)}})
    assert data.compare_prompts(with_lone_seed, LORA, BILORA, "i2t")[0].a == pytest.approx(0.3)
    without_change = make_scores(I2T | {LION: {0: (0.2,)}})
    for order in ("gain", "loss"):
        assert data.list_prompts(replace(VIEW, order=order), without_change)[-1].text == LION


def test_a_score_is_formatted_times_100():
    assert data.times_100(0.31417) == "31.42"
    assert data.times_100(-0.005) == "-0.50"
    assert data.times_100(None) == "–"


def test_prompts_are_sorted_filtered_and_stepped_through(result):
    def texts(metric, order, words=""):
        view = replace(VIEW, metric=metric, order=order, words=words)
        return [row.text for row in data.list_prompts(view, result)]

    orders = {
        "gain": [LION, RABBIT, CLOUD],
        "loss": [CLOUD, RABBIT, LION],
        "name": [CLOUD, LION, RABBIT],
        "list": [RABBIT, CLOUD, LION],
    }
    assert set(data.ORDERS) == set(orders)
    for order, expected in orders.items():
        assert texts("i2t", order) == expected
    assert texts("nearest", "gain") == orders["loss"], "less memorization must be a gain"
    assert texts("nearest", "loss") == orders["gain"]
    assert texts("i2t", "list", "ICON cloud") == [CLOUD]
    assert texts("i2t", "list", "cloud lion") == []
    listed = data.list_prompts(VIEW, result)
    assert data.find_neighbor(listed, LION, 1) == RABBIT
    assert data.find_neighbor(listed, LION, -1) == LION
    assert data.find_neighbor(listed, CLOUD, 1) == CLOUD
    assert data.find_neighbor(listed[:1], CLOUD, 1) == LION  # an unlisted prompt leads to the first
    assert data.find_neighbor([], CLOUD, 1) == CLOUD


def test_a_link_opens_its_view_and_missing_names_are_reported(result):
    first = data.first_view("scores", result)
    about = {"a": BILORA, "b": LORA, "also": (BASE,), "prompt": CLOUD, "seed": 1}
    view = replace(first, **about, order="name", words="n")
    query = data.write_query(view)
    assert query.startswith("?scores=scores&a=bilora&b=lora&also=base%252C+plain&prompt=")
    assert data.read_query(dict(parse_qsl(query[1:])), "scores", result) == (view, [])
    assert data.read_query({}, "scores", result) == (first, [])
    # A label with commas may contain other labels.
    nested = scores_of(("a", "b", "c", "x,b,c", "50%2Cb"), PROMPTS, {}, (0,))
    for also in (("x,b,c",), ("50%2Cb",), ("c", "x,b,c")):
        query = dict(parse_qsl(data.write_query(replace(VIEW, a="a", b="a", also=also))[1:]))
        assert data.read_query(query, "scores", nested)[0].also == also
    # Names that are no longer in the scores
    lost = {"a": "lora-2", "prompt": "gone", "seed": "x", "metric": "t2t", "order": "up"}
    view, missing = data.read_query(lost, "scores", result)
    assert view == replace(first, also=())
    for word, sentence in zip(lost.values(), missing, strict=True):
        assert f'"{word}"' in sentence


def test_checkpoints_open_with_the_last_and_the_best_step(tmp_path):
    labels = [f"step {step}" for step in (10, 20, 30, 40, 50)]
    images: dict[Key, ScoredImage] = {}
    for label in labels:
        images[label, RABBIT, 0] = ScoredImage(f"{label}.png", {"i2t": 0.5, "truth": 0.5})
    scores = scores_of(labels, PROMPTS[:1], images, (0,))
    entries = []
    for entry in scores.result.subjects:
        step = int(entry.label.removeprefix("step "))
        entries.append(replace(entry, about={"run": "dog", "step": step}))
    answer = {"run": "dog", "last": 50, "candidate": 20, "metric": "truth"}
    answer["sentence"] = "<b>No step</b> is better."
    settings = scores.result.settings | {"answers": [answer]}
    write(data.read_scores(replace(scores.result, subjects=entries, settings=settings)), tmp_path)
    (item,) = Catalog(tmp_path).scan.scores
    view = data.first_view("scores", item.result)
    assert (view.a, view.b, view.metric) == ("step 50", "step 20", "truth")
    assert view.also == ("step 10", "step 30", "step 40")
    assert compare.answers_html(item.result) == "<p>&lt;b&gt;No step&lt;/b&gt; is better.</p>"
    assert compare.answers_html(scores) == ""


def test_a_warning_has_no_markup(result, tmp_path, monkeypatch):
    write(result, tmp_path / "scores")
    notices: list[str] = []
    monkeypatch.setattr(gr, "Warning", notices.append)
    with gr.Blocks() as page:
        tab = compare.Tab(Catalog(tmp_path), page.load)
    evil = '<a href="https://evil.example/">log in again</a>'
    for query in ({"scores": evil}, {"scores": "scores", "a": evil, "prompt": evil}):
        tab.open(SimpleNamespace(query_params=query))  # pyright: ignore[reportArgumentType]
    assert len(notices) == 3
    for notice in notices:
        assert "evil.example" in notice
        assert "<" not in notice


def test_html_has_the_scores_and_escapes_names(result):
    evil = "<img src=x onerror=alert(1)>"
    image = ScoredImage("x.png", {"i2t": 0.3142}, caption=evil, nearest_image=evil)
    cards = parts.card_html(evil, None, "A", evil, compare.facts_html(result, image, None))
    row = replace(data.compare_prompts(result, LORA, BILORA, "i2t")[0], name=evil, text=evil)
    prompts = compare.prompts_html([row], evil, evil, evil)
    cards += compare.legend_html(result)
    assert "<img src=x" not in cards + prompts
    assert "31.42" in cards
    assert "test-CLIP" in cards
    assert prompts.count("aria-current") == 1
    assert f'class="{row.tone}">+1.00' in prompts


@pytest.mark.parametrize(
    ("gains", "tone"),
    [
        ((0.5,), "even"),  # one seed is not enough
        ((0.1, -0.09, 0.1), "even"),
        ((0.1, 0.11, 0.09), "up"),
        ((-0.1, -0.11, -0.09), "down"),
    ],
)
def test_a_difference_that_may_be_due_to_chance_has_no_color(gains, tone):
    scores = {RABBIT: {seed: (0.3, 0.3 + gain) for seed, gain in enumerate(gains)}}
    assert data.compare_prompts(make_scores(scores), LORA, BILORA, "i2t")[0].tone == tone
