"""How rows of text scores are compared, and the report, read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from eval import compare, table
from eval.subjects import Subject
from eval.table import Metric, Result, Summary
from eval.text_scores import TextScores, reporting

Scores = dict[str, dict[int | None, list[float]]]
SHARE = Metric("Bench", "", True, 100.0, ".2f")


def result(scores: Scores, peaks: Sequence[int] = ()) -> Result:
    """A result of one benchmark: group -> seed -> scores of items; and each run's peak memory."""
    subjects, rows = [], []
    for group, seeds in scores.items():
        kind, method, cost = ("base", None, None) if group == "base" else ("run", group, 1)
        for seed, items in seeds.items():
            about = {"cost": cost, "peak_memory": (*peaks, *[None] * 9)[len(subjects)]}
            subject = Subject(f"{group}-{seed}", group, kind, method=method, seed=seed, about=about)
            subjects.append(subject)
            rows.append(subject.row("b", sum(items) / len(items)))
            rows += [subject.row("b", v, item=f"q{n}") for n, v in enumerate(items)]
    control = compare.control(subjects, None)
    lines = reporting.summaries(rows, ["b"], control)
    settings = {"benchmarks": {"b": {"num_fewshot": 5}}}
    return Result(
        "text_scores", subjects, {"b": SHARE}, control, settings, rows=rows, summaries=lines
    )


def line(found: Result, group: str) -> Summary:
    summary = found.summary(group, "b")
    assert summary is not None
    return summary


def test_seeds_are_paired_where_there_are_two() -> None:
    found = result({"lora": {0: [0, 1], 1: [0, 0]}, "bilora": {0: [1, 1], 1: [0, 1], 7: [0, 0]}})
    lora, bilora = line(found, "lora"), line(found, "bilora")
    assert (bilora.control, bilora.over, bilora.pairs, bilora.higher) == ("lora", "seed", 2, 2)
    assert bilora.difference == 0.5
    assert (lora.mean, lora.count, lora.error) == (0.25, 2, pytest.approx(0.25))


def test_items_are_paired_where_there_are_not_and_the_score_is_their_mean() -> None:
    found = result(
        {"lora": {0: [0, 1, 0, 0]}, "base": {None: [0, 0, 0, 0]}, "bilora": {1: [1, 1, 1, 0]}}
    )
    base, bilora = line(found, "base"), line(found, "bilora")
    assert (base.over, base.pairs, base.difference, base.count) == ("item", 4, -0.25, 1)
    assert (bilora.difference, bilora.higher) == (0.5, 2)
    assert bilora.difference_low == pytest.approx(0.5 - 3.182446 * (1 / 3) ** 0.5 / 2)
    rows = [
        replace(row, value=0.9) if (row.group, row.item) == ("bilora", "") else row
        for row in found.rows
    ]
    lines = reporting.summaries(rows, ["b"], "lora")
    assert [one.group for one in lines if one.difference is not None] == ["base"]


def test_the_report_is_read_back(tmp_path: Path) -> None:
    scores: Scores = {"base": {None: [1, 1]}, "lora": {0: [0, 1], 1: [0, 0]}}
    scores["bilora"] = {0: [1, 1], 1: [1, 0]}
    found = result(scores, peaks=(0, 2**30, 3 * 2**29))
    text = TextScores.__new__(TextScores).report(found)
    for words in (
        "| run | seeds | cost | peak memory | Bench | difference |",
        "| lora (control) | 2 | ×1 | 1.50 GiB | 25.00 [0.00, 50.00] |  |",
        "| bilora | 2 | ×1 | – | 75.00 [50.00, 100.00] | +50.00 [+50.00, +50.00], 2/2 |",
        "Bench: bilora is better than lora: +50.00 [+50.00, +50.00], 2/2 seeds better.",
        "num_fewshot 5",
    ):
        assert words in text
    table.write(found, tmp_path, text)
    assert TextScores.__new__(TextScores).report(table.read(tmp_path)) == text
