"""Result files: what is written comes back as it was typed, and nothing else comes through."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from eval.records import DYNAMICS, LANDSCAPE, SWEEP, Format
from eval.statistics import Interval

FORMAT = Format("some", "some.json", "some thing", version=3)


@dataclass(frozen=True)
class Result:
    label: str
    seeds: list[int]
    rows: dict[str, list[float | None]]
    interval: Interval | None
    loose: Any = None
    figures: list[str] = field(default_factory=list)


WHOLE = Result("a", [0, 1], {"x": [1.5, None, 2]}, Interval(0.0, 1.0), {"any": [True]}, ["a.png"])


def test_a_result_comes_back(tmp_path: Path) -> None:
    for made in (WHOLE, Result("b", [], {}, None)):
        FORMAT.write(made, tmp_path)
        assert FORMAT.read(Result, tmp_path) == made
        assert [file.name for file in tmp_path.iterdir()] == ["some.json"]
    head = list(json.loads(FORMAT.text(WHOLE)).items())[:2]
    assert head == [("schema_version", 3), ("kind", "some thing")]
    assert "kind" not in json.loads(SWEEP.text(WHOLE))


@pytest.mark.parametrize(
    "change",
    [
        {"label": None},
        {"label": ["a"]},
        {"seeds": ["0"]},
        {"seeds": [0.5]},
        {"seeds": [True]},
        {"seeds": {"0": 0}},
        {"rows": {"x": ["high"]}},
        {"rows": {"x": [True]}},
        {"rows": [1.0]},
        {"interval": [0, 1]},
        {"interval": {"low": 0}},
        {"interval": {"low": 0, "high": 1, "middle": 0.5}},
        {"figures": "a.png"},
    ],
)
def test_a_value_of_another_type_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    record = json.loads(FORMAT.text(WHOLE)) | change
    (tmp_path / FORMAT.file).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=r"some\.json is damaged: run python -m eval\.some again"):
        FORMAT.read(Result, tmp_path)


def test_a_missing_field_needs_a_default_and_a_later_one_is_passed_over(tmp_path: Path) -> None:
    record = json.loads(FORMAT.text(WHOLE)) | {"later": 1}
    del record["figures"]
    (tmp_path / FORMAT.file).write_text(json.dumps(record), encoding="utf-8")
    assert FORMAT.read(Result, tmp_path).figures == []
    del record["seeds"]
    (tmp_path / FORMAT.file).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        FORMAT.read(Result, tmp_path)


def test_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / LANDSCAPE.file
    for text, said in (
        (DYNAMICS.text(WHOLE), "is 'dynamics' of schema version 1, not 'landscape' of 1"),
        (SWEEP.text(WHOLE), "is None of schema version 1"),
        ('{"schema_version": 2, "kind": "landscape"}', "of schema version 2"),
        ("[1]", "is damaged"),
        ("{}", "is damaged"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            LANDSCAPE.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"holds no landscape\.json"):
        LANDSCAPE.load(tmp_path)
