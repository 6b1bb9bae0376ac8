"""A result comes back as it was written, and nothing else comes through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bilora_diffusion.errors import UserError
from eval import table
from eval.provenance import Provenance
from eval.table import Entry, Metric, Result, Row, Summary

ROWS = [
    Row("a", "LoRA", 0, "i2t", 'a "cat", in\nthe rain', None, 0.1 + 0.2, "images/1.png"),
    Row("a", "LoRA", None, "loss", "", 25, None, "a\rb\r\nc\u2028\x00"),
]
SUMMARIES = [
    Summary("LoRA", "loss", step=25, count=2, mean=1 / 3, error=0.0),
    Summary("LoRA", "loss", "x", mean=1.0, low=-0.5, high=1.5, control="base", higher=1, lower=2),
]
WHOLE = Result(
    kind="landscape",
    subjects=[Entry("a", "LoRA", seed=0, method="lora", about={"cost": 1})],
    metrics={"loss": Metric("held-out loss", scale=1000, form=".2f")},
    control="LoRA",
    settings={"levels": [1, 2], "equal": None},
    notes=["A note."],
    figures=["a.png"],
    provenance=Provenance("python -m eval.landscape a", {"torch": "2"}, None, None, {}, []),
    rows=ROWS,
    summaries=SUMMARIES,
)


def test_a_result_comes_back(tmp_path: Path) -> None:
    for result in (WHOLE, Result("sweep", subjects=[], rows=[], summaries=[])):
        table.write(result, tmp_path, "# Report")
        assert table.read(tmp_path) == result
    names = ["report.md", "result.json", "rows.csv", "summary.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    table.write(WHOLE, tmp_path, "# Report")
    assert table.read(tmp_path, rows=False).rows == []
    assert json.loads((tmp_path / "result.json").read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "rows.csv",
            "subject,group,seed,metric,item,step,value,note\na,b,0,c,,,high,\n",
            "is damaged",
        ),
        ("rows.csv", "subject,group\na,b\n", "is damaged"),
        ("summary.csv", "\x00", "is damaged"),
        (table.FILE, None, r"holds no result\.json"),
        (table.FILE, '{"schema_version": 9, "kind": "sweep"}', r"version 9, .* eval\.sweep"),
        *((table.FILE, text, "is damaged") for text in ("{}", "{")),
    ],
)
def test_what_is_no_result_of_this_version_is_refused(
    tmp_path: Path, file: str, text: str | None, words: str
) -> None:
    table.write(WHOLE, tmp_path, "")
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        table.read(tmp_path)


def test_a_curve_has_the_steps_that_all_of_a_group_have() -> None:
    lines = [
        Summary("LoRA", "loss", step=s, count=c, mean=m)
        for s, c, m in ((5, 1, 1.0), (0, 1, None), (9, 0, 2.0))
    ]
    curve = replace(WHOLE, summaries=lines).curve("LoRA", "loss")
    assert [(point.step, point.mean) for point in curve] == [(0, None), (5, 1.0)]
