"""The report of CLIP scores: the shape of Table 4, the honest sentence, the pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval import compare
from eval.clip_scores import plots, report
from eval.clip_scores.names import METRICS
from eval.provenance import Provenance
from eval.table import Entry, Result, Row

SCORER = {"name": "ViT-T/none", "kind": "open_clip", "model": "ViT-T", "revision": "x", "note": ""}
NOTES = {"nearest": "train-{1}.png", "image": "images/{0}/{1}.png"}
Scores = Mapping[str, Sequence[Sequence[float]]]
"""Score -> prompts of seeds."""


def result(columns: Mapping[str, Scores], general: int = 0, **settings: Any) -> Result:
    """Labels compared with the first; "base" is the base model, and the last prompts are general.

    Args:
        settings: others than the usual.
    """
    shape = next(iter(next(iter(columns.values())).values()))
    texts = [f"an icon of a Thing {n}, in the style of TOK" for n in range(len(shape))]
    rows = [
        Row(label, label, seed, metric, text, None, value, NOTES.get(metric, "").format(label, n))
        for label, scores in columns.items()
        for n, text in enumerate(texts)
        for metric, values in {**scores, "image": [[None] * len(own) for own in shape]}.items()
        for seed, value in enumerate(values[n])
    ]
    scored = len(texts) - general
    prompts = [
        {"text": text, "instance": f"Thing {n}", "general": n >= scored, "truncated": n == 0}
        for n, text in enumerate(texts)
    ]
    usual = {
        "prompts": prompts,
        "prompt_set": "3d_icon",
        "seeds": list(range(len(shape[0]))),
        "sampling": {"base_model": "sdxl", "size": 64, "steps": 25, "guidance_scale": 5.0},
        "scorer": SCORER,
        "captioner": SCORER | {"name": "BLIP/none"},
    }
    control = next(iter(columns))
    return Result(
        kind="clip_scores",
        subjects=[Entry(label, label, "base" if label == "base" else "run") for label in columns],
        metrics=dict(METRICS),
        control=control,
        settings=usual | settings,
        provenance=Provenance("eval a b", {"torch": "2.13.0"}, "0123" * 10, False, {}, []),
        rows=rows,
        summaries=compare.summaries(
            [row for row in rows if row.metric in METRICS], control, over="item"
        ),
    )


def drawn(shift: float, seed: int, prompts: int = 8) -> list[list[float]]:
    generator = random.Random(seed)
    return [[0.3 + shift + generator.gauss(0, 0.01) for _ in range(2)] for _ in range(prompts)]


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with ``first``, without the rule under the head."""
    below = text.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    below = f"| {first} |{below}".splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in below]
    return [rows[0], *rows[2:]]


def test_the_first_table_has_the_shape_of_the_papers() -> None:
    lora, bilora = drawn(0, 1), drawn(0.02, 2)
    made = result({"LoRA": {"i2t": lora, "t2t": bilora}, "Bi-LoRA": {"i2t": bilora, "t2t": lora}})
    text = report.to_markdown(made)
    rows = table(text, "prompt")
    assert rows[0][1:] == ["CLIP I2T LoRA", "CLIP I2T Bi-LoRA", "CLIP T2T LoRA", "CLIP T2T Bi-LoRA"]
    assert [row[0] for row in rows[1:]] == [*(f"Thing {i}" for i in range(6)), "average of 8"]
    for p, row in enumerate(rows[1:7]):
        ours, theirs = sum(bilora[p]) / 2, sum(lora[p]) / 2
        expected = [f"{100 * theirs:.2f}", f"{100 * ours:.2f}"]
        expected[ours > theirs] = f"**{expected[ours > theirs]}**"
        assert row[1:3] == expected
        assert row[3:5] == expected[::-1]
    assert rows[-1][2] == rows[-1][3] == f"**{100 * sum(map(sum, bilora)) / 16:.2f}**"
    for name in ("# CLIP scores by ViT-T/none: LoRA, Bi-LoRA\n", "captions for T2T: BLIP/none"):
        assert name in text


def test_equal_scores_and_a_single_prompt_show_nothing() -> None:
    same = {"i2t": [[0.25, 0.25]] * 3}
    made = result({"LoRA": same, "Bi-LoRA": same}, captioner=None)
    text = report.to_markdown(made)
    assert table(text, "prompt")[1] == ["Thing 0", "**25.00**", "**25.00**"]
    assert "all scores are equal" in text
    for absent in ("largest differences", "BLIP", "Images that are most like"):
        assert absent not in text
    (sentence,) = report.verdicts(result({"LoRA": {"i2t": [[0.1]]}, "Bi-LoRA": {"i2t": [[0.2]]}}))
    assert "one prompt" in sentence
    assert "better" not in sentence


@pytest.mark.parametrize(
    ("shift", "verdict", "words"),
    [
        (0.05, "better", ["Bi-LoRA is better than LoRA: +5.00 ["]),
        (-0.05, "worse", ["Bi-LoRA is worse than LoRA: -", "Bi-LoRA does not beat LoRA"]),
        (0.0, "no difference shown", ["no difference between Bi-LoRA and LoRA", "includes 0."]),
    ],
)
def test_the_report_says_plainly_who_is_better(
    shift: float, verdict: str, words: list[str]
) -> None:
    lora = drawn(0, 1, 40)
    bilora = [[v + shift + (-1) ** p * 0.01 for v in seeds] for p, seeds in enumerate(lora)]
    made = result({"LoRA": {"i2t": lora}, "Bi-LoRA": {"i2t": bilora}, "base": {"i2t": lora}})
    (sentence,) = report.verdicts(made)  # the base model is shown and not judged
    assert all(word in sentence for word in words)
    text = report.to_markdown(made)
    assert f"- {sentence}\n" in text
    row, base = table(text, "adapter")[1:]
    line = made.summary("Bi-LoRA", "i2t")
    assert line is not None
    low, high = (100 * end for end in line.difference_interval or ())
    ends = compare.win_rate_interval(line.higher, line.equal, line.lower)
    assert ends is not None
    assert row == [
        *("Bi-LoRA", "CLIP I2T", f"{100 * (line.difference or 0):+.2f} [{low:+.2f}, {high:+.2f}]"),
        *(verdict, f"{line.higher} / {line.equal} / {line.lower}"),
        f"{100 * line.win_rate:.1f} % [{100 * ends.low:.1f}, {100 * ends.high:.1f}]",
    ]
    assert base[0] == "base"


def test_the_prompts_that_differ_most_stand_in_both_directions() -> None:
    same, changed = [[0.2]] * 4, [[0.3], [0.1], [0.2], [0.25]]
    text = report.to_markdown(result({"LoRA": {"i2t": same}, "Bi-LoRA": {"i2t": changed}}))
    rows = table(text, "Bi-LoRA above LoRA")
    assert rows[1:] == [["Thing 0 +10.00", "Thing 1 -10.00"], ["Thing 3 +5.00", "–"]]


def test_memorization_names_the_image_and_the_training_picture() -> None:
    likeness = {name: [[0.5, 0.6], [0.99, 0.1]] for name in ("i2t", "nearest")}
    rows = table(report.to_markdown(result({"LoRA": likeness})), "cosine x 100")[1:]
    assert rows[0] == ["99.00", "LoRA", "Thing 1", "0", "train-1.png", "images/LoRA/1.png"]
    assert [row[0] for row in rows] == ["99.00", "60.00", "50.00", "10.00"]


def test_other_scores_are_explained_and_missing_ones_left_blank() -> None:
    values = drawn(0, 1, 3)
    truth = {"i2t": values, "truth": values}
    text = report.to_markdown(result({"LoRA": truth | {"drift": values}, "base": truth}))
    rows = table(text, "score")
    assert [row[0] for row in rows[1:]] == ["ground truth", "unchanged"]
    assert rows[2][-1] == "–"
    assert rows[2][3].startswith(f"{100 * sum(map(sum, values)) / 6:.2f} [")
    assert f"- unchanged: {METRICS['drift'].explanation}" in text


def test_what_a_reader_has_to_know_is_told() -> None:
    columns = {"a|b": {"i2t": drawn(0, 1)}, "c": {"i2t": drawn(0, 2)}}
    made = result(columns, scorer=SCORER | {"kind": "embedded", "note": "Of icons only."})
    text = report.to_markdown(replace(made, figures=["grid.png"], notes=["Of the demo."]))
    many = report.to_markdown(result({"LoRA": {"i2t": drawn(0, 1, 10)}}))
    for words in ("never set beside the paper's", "fewer than 10 prompts"):
        assert words in text
        assert words not in many
    for words in (
        *("> Of the demo.", "1 of 8 prompts", "(grid.png)", "`eval a b`", "torch 2.13.0"),
        *("012301230123", "| prompt | CLIP I2T a\\|b | CLIP I2T c |"),
    ):
        assert words in text


def test_the_pictures_are_drawn_and_nothing_else_is_left(tmp_path: Path) -> None:
    nothing = result({"base": {"drift": drawn(0, 1)}}, general=8)
    assert plots.draw(nothing, tmp_path, {}, 6) == []
    assert list(tmp_path.iterdir()) == []
    columns = {
        label: {name: drawn(0, at + n) for n, name in enumerate(("i2t", "t2t", "nearest"))}
        for at, label in enumerate(("LoRA", "Bi-LoRA"))
    }
    made = result(columns, general=3)
    for row in made.select("image"):
        file = tmp_path / row.note
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(file)
    truths = {made.rows[0].item: Image.new("RGB", (8, 8), "blue")}
    for held, rows, shape in ((truths, 6, (3, 5)), ({}, 2, (2, 2))):
        names = ["grid.png", "differences.png", "memorization.png"]
        assert plots.draw(made, tmp_path, held, rows) == names
        assert sorted(path.name for path in tmp_path.glob("*.*")) == sorted(names)
        with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / names[1]) as other:
            assert grid.size == (
                int((shape[0] * 1.5 + 1.2) * 120),
                int((shape[1] * 1.5 + 0.4) * 120),
            )
            assert other.size[0] > 800
