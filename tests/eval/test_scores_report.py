"""The report of CLIP scores: Table 4's shape, who is better, what has to be known, the grid."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval import compare, report
from eval.clip_scores import ClipScores, shown
from eval.clip_scores.names import METRICS
from eval.provenance import Provenance
from eval.table import Entry, Result, Row

SCORER = {"name": "ViT-T/none", "kind": "open_clip", "model": "ViT-T", "revision": "x", "note": ""}
Scores = Mapping[str, Sequence[Sequence[float]]]
"""Score -> prompts of seeds."""


def result(columns: Mapping[str, Scores], **settings: Any) -> Result:
    """Labels compared with the first; "base" is the base model."""
    shape = next(iter(next(iter(columns.values())).values()))
    texts = [f"an icon of a Thing {n}, in the style of TOK" for n in range(len(shape))]
    rows = [
        Row(label, label, seed, metric, text, None, value, f"images/{label}/{n}.png")
        for label, scores in columns.items()
        for n, text in enumerate(texts)
        for metric, values in {**scores, "image": [[None] * len(own) for own in shape]}.items()
        for seed, value in enumerate(values[n])
    ]
    prompts = [
        {"text": text, "instance": f"Thing {n}", "general": False, "truncated": n == 0}
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
    scored = [row for row in rows if row.metric in METRICS]
    return Result(
        kind="clip_scores",
        subjects=[Entry(label, label, "base" if label == "base" else "run") for label in columns],
        metrics=dict(METRICS),
        control=control,
        settings=usual | settings,
        provenance=Provenance("eval a b", {"torch": "2.13.0"}, "0123" * 10, False, {}, []),
        rows=rows,
        summaries=compare.summaries(scored, control, over="item"),
    )


def drawn(shift: float, seed: int, prompts: int = 8) -> list[list[float]]:
    generator = random.Random(seed)
    return [[0.3 + shift + generator.gauss(0, 0.01) for _ in range(2)] for _ in range(prompts)]


def to_markdown(made: Result) -> str:
    return ClipScores.__new__(ClipScores).report(made)


def test_the_first_prompts_and_the_average_have_the_shape_of_the_papers_table() -> None:
    lora, bilora = drawn(0, 1), drawn(0.02, 2)
    made = result({"LoRA": {"i2t": lora, "t2t": bilora}, "Bi-LoRA": {"i2t": bilora, "t2t": lora}})
    lines = shown.scores(made).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert rows[0][1:] == ["CLIP I2T LoRA", "CLIP I2T Bi-LoRA", "CLIP T2T LoRA", "CLIP T2T Bi-LoRA"]
    assert [row[0] for row in rows[2:]] == [*(f"Thing {i}" for i in range(6)), "average of 8"]
    for p, row in enumerate(rows[2:8]):
        ours, theirs = sum(bilora[p]) / 2, sum(lora[p]) / 2
        expected = [f"{100 * theirs:.2f}", f"{100 * ours:.2f}"]
        expected[ours > theirs] = f"**{expected[ours > theirs]}**"
        assert row[1:] == [*expected, *expected[::-1]]
    assert rows[-1][2] == rows[-1][3] == f"**{100 * sum(map(sum, bilora)) / 16:.2f}**"


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.05, "Bi-LoRA is better than LoRA: +5.00 ["),
        (-0.05, "Bi-LoRA is worse than LoRA: -"),
        (0.0, "no difference between Bi-LoRA and LoRA is shown: "),
    ],
)
def test_the_report_says_plainly_who_is_better(shift: float, words: str) -> None:
    lora = drawn(0, 1, 40)
    bilora = [[v + shift + (-1) ** p * 0.01 for v in seeds] for p, seeds in enumerate(lora)]
    made = result({"LoRA": {"i2t": lora}, "Bi-LoRA": {"i2t": bilora}})
    (sentence,) = report.verdicts(made, shown.PAPER)
    assert words in sentence
    text, line = to_markdown(made), made.summary("Bi-LoRA", "i2t")
    assert f"- {sentence}\n" in text
    assert line is not None
    low, high = (100 * end for end in line.difference_interval or ())
    cell = f"{100 * (line.difference or 0):+.2f} [{low:+.2f}, {high:+.2f}], {line.higher}/40"
    assert f"| {cell} |" in text


def test_the_grid_is_drawn(tmp_path: Path) -> None:
    made = result({label: {"i2t": drawn(0, 1, 5)} for label in ("LoRA", "Bi-LoRA")})
    for row in made.select("image"):
        file = tmp_path / row.note
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(file)
    truths = {made.rows[0].item: Image.new("RGB", (8, 8), "blue")}
    for held, rows, shape in ((truths, 6, (3, 5)), ({}, 2, (2, 2))):
        assert shown.grid(made, tmp_path, held, rows)
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.size == tuple(
                int(side * 120) for side in (shape[0] * 1.5 + 1.2, shape[1] * 1.5 + 0.4)
            )
