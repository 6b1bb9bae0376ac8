"""The report of CLIP scores: the shape of Table 4, the honest sentence, the pictures."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from eval import compare
from eval.clip_scores import plots, report
from tests.eval.score_results import SCORER, Values, result


def drawn(shift: float, seed: int, prompts: int = 8) -> list[list[float]]:
    generator = random.Random(seed)
    return [[0.3 + shift + generator.gauss(0, 0.01) for _ in range(2)] for _ in range(prompts)]


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with ``first``, without the rule under the head."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
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
    assert "Scorer: ViT-T/none; captions for T2T: BLIP/none" in text
    assert text.startswith("# CLIP scores by ViT-T/none: LoRA, Bi-LoRA\n")


def test_scores_that_are_missing_are_left_out_and_equal_bests_are_both_bold() -> None:
    values = [[0.25, 0.25]] * 3
    columns = {"A": {"i2t": values}, "B": {"i2t": values}}
    text = report.to_markdown(result(columns, settings={"captioner": None}))
    assert table(text, "prompt")[1] == ["Thing 0", "**25.00**", "**25.00**"]
    assert "T2T left out" in text
    assert "Images that are most like" not in text


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.05, ["Bi-LoRA is better than LoRA: +5.00 ["]),
        (-0.05, ["Bi-LoRA is worse than LoRA: -", "Bi-LoRA does not beat LoRA"]),
        (0.0, ["no difference between Bi-LoRA and LoRA is shown", "includes 0."]),
    ],
)
def test_the_report_says_plainly_who_is_better(shift: float, words: list[str]) -> None:
    lora = drawn(0, 1, 40)
    bilora = [[v + shift + (-1) ** p * 0.01 for v in seeds] for p, seeds in enumerate(lora)]
    made = result({"LoRA": {"i2t": lora}, "Bi-LoRA": {"i2t": bilora}, "base": {"i2t": lora}})
    (sentence,) = report.verdicts(made)  # the base model is shown and not judged
    assert all(word in sentence for word in words)
    text = report.to_markdown(made)
    assert f"- {sentence}\n" in text
    assert [row[0] for row in table(text, "adapter")[1:]] == ["Bi-LoRA", "base"]


def test_equal_scores_and_a_single_prompt_show_nothing() -> None:
    same = drawn(0, 1)
    (sentence,) = report.verdicts(result({"LoRA": {"i2t": same}, "Bi-LoRA": {"i2t": same}}))
    assert "all scores are equal" in sentence
    one = result({"LoRA": {"i2t": [[0.1]]}, "Bi-LoRA": {"i2t": [[0.2]]}})
    (sentence,) = report.verdicts(one)
    assert "one prompt shows no difference" in sentence
    assert "better" not in sentence


def test_the_differences_have_win_rates_and_intervals() -> None:
    made = result({"LoRA": {"i2t": drawn(0, 1)}, "Bi-LoRA": {"i2t": drawn(0.05, 2)}})
    line, rate = made.summary("Bi-LoRA", "i2t"), compare.win_rate_interval(8, 0, 0)
    assert line is not None
    assert rate is not None
    low, high = (100 * end for end in line.difference_interval or ())
    (row,) = table(report.to_markdown(made), "adapter")[1:]
    assert row[2] == f"{100 * (line.difference or 0):+.2f} [{low:+.2f}, {high:+.2f}]"
    assert row[3:] == ["better", "8 / 0 / 0", f"100.0 % [{100 * rate.low:.1f}, 100.0]"]


def test_the_largest_differences_stand_in_both_directions() -> None:
    zero: Values = [[0.2]] * 4
    changed: Values = [[0.3], [0.1], [0.2], [0.25]]
    made = result({"LoRA": {"i2t": zero}, "Bi-LoRA": {"i2t": changed}})
    rows = table(report.to_markdown(made), "Bi-LoRA above LoRA")
    assert rows[1:] == [["Thing 0 +10.00", "Thing 1 -10.00"], ["Thing 3 +5.00", "–"]]
    same = result({"LoRA": {"i2t": zero}, "Bi-LoRA": {"i2t": zero}})
    assert "largest differences" not in report.to_markdown(same)


def test_memorization_names_the_image_and_the_training_picture() -> None:
    likeness: Values = [[0.5, 0.6], [0.99, 0.1]]
    made = result({"LoRA": {"i2t": likeness, "nearest": likeness}})
    rows = table(report.to_markdown(made), "cosine x 100")[1:]
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
    assert "- unchanged: cosine" in text


def test_what_a_reader_has_to_know_is_told() -> None:
    embedded = SCORER | {"name": "small-CLIP", "kind": "embedded", "note": "Of icons only."}
    columns = {"a|b": {"i2t": drawn(0, 1)}, "c": {"i2t": drawn(0, 2)}}
    made = result(columns, settings={"scorer": embedded}, notes=["These are the demo's runs."])
    made.settings["prompts"][0]["truncated"] = True
    text = report.to_markdown(replace(made, figures=["grid.png"]))
    for words in (
        *("scores of small-CLIP", "never set beside the paper's", "> These are the demo's runs."),
        *("> With fewer than 10 prompts", "1 of 8 prompts are longer", "(grid.png)"),
        *("`python -m eval.clip_scores a b`", "torch 2.13.0", "commit 012301230123."),
        "| prompt | CLIP I2T a\\|b | CLIP I2T c |",
    ):
        assert words in text
    many = report.to_markdown(result({"LoRA": {"i2t": drawn(0, 1, 10)}}))
    assert "too narrow" not in many
    assert "never set beside" not in many


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        picture.load()
        return picture.size


def test_the_pictures_are_drawn_and_nothing_else_is_left(tmp_path: Path) -> None:
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
    assert plots.draw(made, tmp_path, truths, 6) == [
        *("grid.png", "differences.png", "memorization.png")
    ]
    assert len(list(tmp_path.glob("*.*"))) == 3
    assert size(tmp_path / "differences.png")[0] > 800
    for held, rows, expected in ((truths, 6, (3, 5)), ({}, 2, (2, 2))):
        assert plots.grid(made, tmp_path, held, rows)
        columns_and_rows = expected[0] * 1.5 + 1.2, expected[1] * 1.5 + 0.4
        assert size(tmp_path / "grid.png") == tuple(
            int(inches * 120) for inches in columns_and_rows
        )


def test_no_picture_is_drawn_of_nothing(tmp_path: Path) -> None:
    made = result({"base": {"drift": drawn(0, 1)}}, general=8)
    assert plots.draw(made, tmp_path, {}, 6) == []
    assert list(tmp_path.iterdir()) == []
