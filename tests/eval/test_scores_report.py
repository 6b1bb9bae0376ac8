"""The report of CLIP scores: the shape of Table 4, the honest sentence, the CSV, the pictures."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from eval.scores import grid, plots, report
from eval.scores.schema import ScoresResult
from tests.eval.score_results import EMBEDDED, Values, result


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
    rows = table(report.to_markdown(made), "prompt")
    assert rows[0][1:] == ["CLIP I2T LoRA", "CLIP I2T Bi-LoRA", "CLIP T2T LoRA", "CLIP T2T Bi-LoRA"]
    assert [row[0] for row in rows[1:]] == [*(f"Thing {i}" for i in range(6)), "average of 8"]
    for p, row in enumerate(rows[1:7]):
        ours, theirs = sum(bilora[p]) / 2, sum(lora[p]) / 2
        expected = [f"{100 * theirs:.2f}", f"{100 * ours:.2f}"]
        expected[ours > theirs] = f"**{expected[ours > theirs]}**"
        assert row[1:3] == expected
        assert row[3:5] == expected[::-1]
    average = sum(map(sum, bilora)) / 16
    assert rows[-1][2] == f"**{100 * average:.2f}**"
    assert rows[-1][3] == f"**{100 * average:.2f}**"


def test_names_of_scorer_and_captioner_stand_over_the_table() -> None:
    made = result({"LoRA": {"i2t": drawn(0, 1), "t2t": drawn(0, 1)}})
    assert "Scorer: ViT-T/none; captions for T2T: BLIP/none" in report.caption(made)
    assert report.caption(made) in report.to_markdown(made)
    assert report.to_markdown(made).startswith("# CLIP scores by ViT-T/none: LoRA\n")
    without = result({"LoRA": {"i2t": drawn(0, 1)}}, captioner=None)
    assert "T2T left out" in report.caption(without)
    assert table(report.to_markdown(without), "prompt")[0] == ["prompt", "CLIP I2T LoRA"]


def test_equal_bests_are_both_bold() -> None:
    values = [[0.25, 0.25]] * 3
    rows = table(report.to_markdown(result({"A": {"i2t": values}, "B": {"i2t": values}})), "prompt")
    assert rows[1] == ["Thing 0", "**25.00**", "**25.00**"]


@pytest.mark.parametrize(
    ("shift", "beginning", "end"),
    [
        (0.05, "CLIP I2T: Bi-LoRA is better than LoRA: +5.00 [", "]."),
        (-0.05, "CLIP I2T: Bi-LoRA is worse than LoRA: -", " Bi-LoRA does not beat LoRA here."),
        (0.0, "CLIP I2T: no difference between Bi-LoRA and LoRA is shown: ", " includes 0."),
    ],
)
def test_the_report_says_plainly_who_is_better(shift: float, beginning: str, end: str) -> None:
    lora = drawn(0, 1, 40)
    bilora = [[v + shift + (-1) ** p * 0.01 for v in seeds] for p, seeds in enumerate(lora)]
    made = result({"LoRA": {"i2t": lora}, "Bi-LoRA": {"i2t": bilora}})
    (sentence,) = report.verdicts(made)
    assert sentence.startswith(beginning)
    assert sentence.endswith(end)
    assert f"- {sentence}\n" in report.to_markdown(made)


def test_equal_scores_and_a_single_prompt_show_nothing() -> None:
    same = drawn(0, 1)
    (sentence,) = report.verdicts(result({"LoRA": {"i2t": same}, "Bi-LoRA": {"i2t": same}}))
    assert sentence.endswith("includes 0 (all scores are equal).")
    one = result({"LoRA": {"i2t": [[0.1]]}, "Bi-LoRA": {"i2t": [[0.2]]}})
    (sentence,) = report.verdicts(one)
    assert sentence.startswith("CLIP I2T: one prompt shows no difference")
    assert "[n/a]" in sentence
    assert "better" not in sentence


def test_the_base_model_is_shown_but_not_judged() -> None:
    columns = {"LoRA": {"i2t": drawn(0, 1)}, "base": {"i2t": drawn(-0.1, 2)}}
    made = result(columns)
    assert report.verdicts(made) == []
    text = report.to_markdown(made)
    assert "CLIP I2T base" in text
    assert table(text, "adapter")[1][0] == "base"


def test_the_differences_have_win_rates_and_intervals() -> None:
    made = result({"LoRA": {"i2t": drawn(0, 1)}, "Bi-LoRA": {"i2t": drawn(0.05, 2)}})
    found = made.comparisons[0]
    assert found.interval is not None
    assert found.win_rate_interval is not None
    (row,) = table(report.to_markdown(made), "adapter")[1:]
    assert row == [
        "Bi-LoRA",
        "CLIP I2T",
        f"{100 * found.mean:+.2f} [{100 * found.interval.low:+.2f},"
        f" {100 * found.interval.high:+.2f}]",
        "better",
        "8 / 0 / 0",
        f"100.0 % [{100 * found.win_rate_interval.low:.1f}, 100.0]",
    ]


def test_the_largest_differences_stand_in_both_directions() -> None:
    zero: Values = [[0.2]] * 4
    changed: Values = [[0.3], [0.1], [0.2], [0.25]]
    made = result({"LoRA": {"i2t": zero}, "Bi-LoRA": {"i2t": changed}})
    rows = table(report.to_markdown(made), "Bi-LoRA above LoRA")
    assert rows[1:] == [
        ["Thing 0 +10.00", "Thing 1 -10.00"],
        ["Thing 3 +5.00", "–"],
    ]
    same = result({"LoRA": {"i2t": zero}, "Bi-LoRA": {"i2t": zero}})
    assert "largest differences" not in report.to_markdown(same)


def test_memorization_names_the_image_and_the_training_picture() -> None:
    likeness: Values = [[0.5, 0.6], [0.99, 0.1]]
    made = result({"LoRA": {"i2t": likeness, "nearest": likeness}})
    rows = table(report.to_markdown(made), "cosine x 100")
    assert rows[1] == [
        "99.00",
        "LoRA",
        "Thing 1",
        "0",
        "train-1.png",
        "images/LoRA/seed-0/1.png",
    ]
    assert [row[0] for row in rows[1:]] == ["99.00", "60.00", "50.00", "10.00"]
    assert "Images that are most like" not in report.to_markdown(result({"A": {"i2t": likeness}}))


def test_other_scores_are_explained_and_missing_ones_left_blank() -> None:
    values, none = drawn(0, 1, 3), [[None, None]] * 3
    made = result(
        {
            "LoRA": {"i2t": values, "drift": values, "truth": values},
            "base": {"i2t": values, "drift": none, "truth": values},
        }
    )
    text = report.to_markdown(made)
    rows = table(text, "score")
    assert [row[0] for row in rows[1:]] == ["ground truth", "unchanged"]
    assert rows[2][-1] == "–"
    assert rows[2][3].startswith(f"{100 * sum(map(sum, values)) / 6:.2f} [")
    assert "- unchanged: cosine" in text


def test_the_embedded_scorers_scores_are_kept_apart_from_the_papers() -> None:
    columns = {"LoRA": {"i2t": drawn(0, 1)}}
    text = report.to_markdown(
        result(columns, scorer=EMBEDDED, notes=["These are the demo's runs."])
    )
    assert "scores of small-CLIP" in text
    assert "never set beside the paper's" in text
    assert "> These are the demo's runs." in text
    assert "never set beside" not in report.to_markdown(result(columns))


def test_long_prompts_and_the_origin_are_told() -> None:
    from dataclasses import replace

    made = result({"LoRA": {"i2t": drawn(0, 1)}})
    prompts = [replace(made.prompts[0], truncated=True), *made.prompts[1:]]
    text = report.to_markdown(replace(made, prompts=prompts, figures=["grid.png"]))
    assert "1 of 8 prompts are longer" in text
    assert "`python -m eval.clip_scores runs/LoRA runs/Bi-LoRA`" in text
    assert "torch 2.13.0" in text
    assert "commit 0123456789ab." in text
    assert "![grid.png](grid.png)" in text


def test_few_prompts_are_told() -> None:
    few = result({"LoRA": {"i2t": drawn(0, 1, 9)}, "Bi-LoRA": {"i2t": drawn(0, 2, 9)}})
    many = result({"LoRA": {"i2t": drawn(0, 1, 10)}, "Bi-LoRA": {"i2t": drawn(0, 2, 10)}})
    assert "> With fewer than 10 prompts" in report.to_markdown(few)
    assert "too narrow" not in report.to_markdown(many)


def test_a_label_cannot_break_a_table() -> None:
    text = report.to_markdown(result({"a|b": {"i2t": drawn(0, 1)}, "c": {"i2t": drawn(0, 2)}}))
    heads = [line for line in text.splitlines() if "CLIP I2T a" in line]
    assert heads == ["| prompt | CLIP I2T a\\|b | CLIP I2T c |"]


def test_the_csv_has_a_row_for_each_image() -> None:
    values = drawn(0, 1, 3)
    made = result({"LoRA": {"i2t": values, "t2t": values}, "B,1": {"i2t": values}}, general=1)
    rows = list(csv.DictReader(io.StringIO(report.to_csv(made))))
    assert len(rows) == len(made.images) == 12
    for row, image in zip(rows, made.images, strict=True):
        assert row["adapter"] == made.adapters[image.adapter].label
        assert row["prompt"] == made.prompts[image.prompt].text
        assert float(row["i2t"]) == image.i2t
        assert row["t2t"] == ("" if image.t2t is None else repr(image.t2t))
        assert row["scorer"] == "ViT-T/none"
        assert row["drift"] == ""
    assert rows[-1]["general"] == "True"


def paint(made: ScoresResult, folder: Path) -> None:
    for number, image in enumerate(made.images):
        file = folder / image.file
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number % 256, 100, 0)).save(file)


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        picture.load()
        return picture.size


def test_the_pictures_are_drawn_and_nothing_else_is_left(tmp_path: Path) -> None:
    made = result(
        {
            "LoRA": {"i2t": drawn(0, 1), "t2t": drawn(0, 2), "nearest": drawn(0.3, 3)},
            "Bi-LoRA": {"i2t": drawn(0.01, 4), "t2t": drawn(0, 5), "nearest": drawn(0.2, 6)},
        }
    )
    assert plots.draw(made, tmp_path) == ["differences.png", "memorization.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == plots.draw(made, tmp_path)
    assert size(tmp_path / "differences.png")[0] > 800


def test_no_picture_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert plots.draw(result({"base": {"i2t": drawn(0, 1)}}, control=None), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("truths", "rows"), [([], 2), ([0], 6)])
def test_the_grid_has_a_row_for_each_prompt(
    truths: Sequence[int], rows: int, tmp_path: Path
) -> None:
    made = result({"LoRA": {"i2t": drawn(0, 1, 7)}, "Bi-LoRA": {"i2t": drawn(0, 2, 7)}}, general=2)
    paint(made, tmp_path)
    pictures = {prompt: Image.new("RGB", (8, 8), "blue") for prompt in truths}
    assert grid.draw(made, tmp_path, pictures, rows) == ["grid.png"]
    width, height = size(tmp_path / "grid.png")
    shown = min(rows, 5)  # of seven prompts the last two are general
    assert height == int((1.5 * shown + 0.4) * 120)
    assert width == int((1.5 * (2 + bool(truths)) + 1.2) * 120)
