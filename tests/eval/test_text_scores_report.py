"""Comparisons of text scores, the report, the result's file, and what is kept between starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from eval.text import compare, report
from eval.text.journal import Store
from eval.text.schema import (
    PERCENT,
    POINTS,
    BenchmarkEntry,
    Item,
    Measured,
    RunEntry,
    Score,
    TextScores,
)


def result(values: dict[str, dict[int | None, list[float]]], unit: str = PERCENT) -> TextScores:
    """A result of one benchmark: row -> seed -> scores of items."""
    higher = unit == PERCENT
    column = BenchmarkEntry("b", "Bench", "acc,none", unit, higher, {"num_fewshot": 5})
    runs, scores = [], []
    for group, seeds in values.items():
        for seed, items in seeds.items():
            kind, method = ("base", None) if group == "base" else ("run", group)
            name = f"{group}-{seed}"
            cost = None if kind == "base" else 1
            runs.append(
                RunEntry(name, group, kind, name, method, cost, seed, None, "", "m", "none")
            )
            made = [Item(f"q{n}", value, value >= 0) for n, value in enumerate(items)]
            mean = sum(items) / len(items)
            scores.append(Score(len(runs) - 1, 0, Measured(mean, made)))
    control = compare.settle_control(runs, None)
    return TextScores(
        runs=runs,
        benchmarks=[column],
        scores=scores,
        summaries=compare.summaries(runs, [column], scores),
        comparisons=compare.comparisons(runs, [column], scores, control),
        provenance={"command": "python -m eval.text_scores", "versions": {"torch": "2"}},
    )


def test_seeds_are_paired_where_there_are_two() -> None:
    found = result({"lora": {0: [0, 1], 1: [0, 0]}, "bilora": {0: [1, 1], 1: [0, 1], 7: [0, 0]}})
    (one,) = found.comparisons
    assert (one.group, one.control, one.over, one.pairs, one.better) == (
        "bilora",
        "lora",
        "seeds",
        2,
        2,
    )
    assert one.mean == 0.5
    lora = found.summaries[0]
    assert (lora.mean, lora.runs) == (0.25, 2)
    assert lora.error == pytest.approx(0.25)


def test_items_are_paired_where_there_are_not() -> None:
    found = result(
        {"lora": {0: [0, 1, 0, 0]}, "base": {None: [0, 0, 0, 0]}, "bilora": {1: [1, 1, 1, 0]}}
    )
    of_base, of_bilora = found.comparisons
    assert (of_base.group, of_base.over, of_base.pairs, of_base.mean) == ("base", "items", 4, -0.25)
    assert (of_bilora.mean, of_bilora.better) == (0.5, 2)
    assert of_bilora.interval is not None
    assert of_bilora.interval.low == pytest.approx(0.5 - 3.182446 * (1 / 3) ** 0.5 / 2)
    assert compare.rows(found.runs)[0] == "base"


def test_only_common_items_are_paired_and_none_without_scores() -> None:
    assert compare.means_of_items(Measured(0.5, [Item("a", 1.0), Item("b", 0.0), Item("c", None)]))
    assert not compare.means_of_items(Measured(0.9, [Item("a", 1.0), Item("b", 0.0)]))
    assert not compare.means_of_items(Measured(0.5, []))
    assert compare.t_interval([1.0]) is None


def test_an_unknown_control_is_refused() -> None:
    runs = result({"lora": {0: [1]}, "bilora": {0: [1]}}).runs
    assert compare.settle_control(runs, "bilora") == "bilora"
    with pytest.raises(UserError, match=r'--control is "bi-lora" \(did you mean "bilora"\?\)'):
        compare.settle_control(runs, "bi-lora")
    assert compare.settle_control(runs[:1], None) is None


def test_the_table_has_the_papers_shape() -> None:
    found = result(
        {"base": {None: [1, 1]}, "lora": {0: [0, 1], 1: [0, 0]}, "bilora": {0: [1, 1], 1: [1, 0]}}
    )
    assert report.table(found).splitlines() == [
        "| method | cost | Bench |",
        "|---|---|---|",
        "| base | – | 100.00 |",
        "| lora | ×1 | 25.00 ± 25.00 |",
        "| bilora | ×1 | **75.00 ± 25.00** |",
    ]
    text = report.to_markdown(found)
    assert "| bilora | Bench | +50.00 [+50.00, +50.00] | better | 2 of 2 seeds |" in text
    assert "With fewer than 5 seeds a bootstrap interval is too narrow." in text
    assert "num_fewshot 5" in text
    assert "Bench: bilora is better than lora" in report.sentences(found)[-1]


def test_of_losses_the_lower_is_better() -> None:
    found = result({"lora": {0: [2.0], 1: [2.1]}, "bilora": {0: [1.0], 1: [1.1]}}, POINTS)
    assert "**1.0500 ± 0.0500**" in report.table(found)
    assert "Bench (lower is better)" in report.table(found)
    assert "bilora is better than lora: -1.0000 [-1.0000, -1.0000]" in report.sentences(found)[0]


def test_the_base_model_of_several_seeds_is_one_row() -> None:
    found = result({"base": {0: [0.0], 1: [1.0]}, "lora": {0: [1.0], 1: [1.0]}}, POINTS)
    assert [s.group for s in found.summaries] == ["base", "lora"]
    assert [(c.group, c.pairs, c.mean) for c in found.comparisons] == [("base", 2, -0.5)]


def test_the_most_memory_that_a_run_of_the_row_took() -> None:
    found = result({"base": {0: [0.0]}, "lora": {0: [1.0], 1: [0.0]}})
    assert "peak memory" not in report.table(found)
    peaks = (None, 2**30, 3 * 2**29)
    runs = [replace(run, peak_memory=peak) for run, peak in zip(found.runs, peaks, strict=True)]
    lines = report.table(replace(found, runs=runs)).splitlines()
    assert lines[0].startswith("| method | cost | peak memory | Bench")
    assert lines[2].startswith("| base | – | – |")
    assert lines[3].startswith("| lora | ×1 | 1.50 GiB |")


def test_the_csv_has_a_row_per_run_and_benchmark() -> None:
    lines = report.to_csv(result({"lora": {0: [0, 1, -1]}, "bilora": {0: [1, 1, 1]}})).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("run,group,kind,method,seed,")
    assert lines[1] == 'lora-0,lora,run,lora,0,,m,none,1,,b,"acc,none",%,0.0,3,1,'


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = result({"lora": {0: [0, 1], 1: [1, 1]}, "base": {None: [1, 0]}})
    found.write(tmp_path)
    assert TextScores.read(tmp_path) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 99}, "of schema version 99"),
        ({"kind": "sweep"}, "is 'sweep'"),
        ({"runs": [{"nonsense": 1}]}, "is damaged"),
        ({"runs": []}, "is damaged"),
    ],
)
def test_another_file_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    result({"lora": {0: [0, 1]}}).write(tmp_path)
    path = tmp_path / "text_scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        TextScores.read(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        TextScores.read(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"holds no text_scores\.json"):
        TextScores.read(tmp_path)


def test_what_is_kept_belongs_to_its_circumstances(tmp_path: Path) -> None:
    store, measured = Store(tmp_path), Measured(0.5, [Item("a", 0.5)], {"x": 1.0}, {"k": [1]})
    store.save("one", {"limit": 3}, measured)
    assert store.load("one", {"limit": 3}) == measured
    assert store.load("one", {"limit": 4}) is None
    assert store.load("two", {"limit": 3}) is None
    (tmp_path / "pieces" / "one.json").write_text("{")
    assert store.load("one", {"limit": 3}) is None


def test_a_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Store(tmp_path).journal("j", {"a": 1})
    journal.add("x", "1\n2")
    with (tmp_path / "pieces" / "j.jsonl").open("a") as file:
        file.write('{"key": "y", "va')
    again = Store(tmp_path).journal("j", {"a": 1})
    assert again.values == {"x": "1\n2"}
    again.add("z", 3)
    assert Store(tmp_path).journal("j", {"a": 1}).values == {"x": "1\n2", "z": 3}
    assert Store(tmp_path).journal("j", {"a": 2}).values == {}
