"""``scores.json``: what is written is read back, and what is not that file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from eval.records import SCORES
from eval.scores.schema import ScoresResult
from eval.statistics import Interval
from tests.eval.score_results import EMBEDDED, result

VALUES = [[0.3, 0.31], [0.2, 0.4], [0.25, 0.1]]


def some(**changes: Any) -> ScoresResult:
    return result(
        {"LoRA": {"i2t": VALUES}, "Bi-LoRA": {"i2t": VALUES[::-1], "nearest": VALUES}}, **changes
    )


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    made = some(
        diversity={"LoRA": {"a ToK icon of a thing 0, in the style of ToK": 0.25}},
        figures=["grid.png"],
        notes=["Of the demo."],
    )
    SCORES.write(made, tmp_path)
    read = SCORES.read(ScoresResult, tmp_path)
    assert read == made
    assert isinstance(read.comparisons[0].interval, Interval)
    record = json.loads((tmp_path / SCORES.file).read_text())
    assert record["schema_version"] == SCORES.version
    assert record["kind"] == SCORES.kind
    assert [path.name for path in tmp_path.iterdir()] == [SCORES.file]


def test_a_result_without_captions_comes_back(tmp_path: Path) -> None:
    made = some(scorer=EMBEDDED, captioner=None)
    SCORES.write(made, tmp_path)
    assert SCORES.read(ScoresResult, tmp_path) == made


def test_what_has_a_default_may_be_absent(tmp_path: Path) -> None:
    SCORES.write(some(), tmp_path)
    record = json.loads((tmp_path / SCORES.file).read_text())
    for name in ("diversity", "figures", "notes"):
        del record[name]
    (tmp_path / SCORES.file).write_text(json.dumps(record | {"a later field": 1}))
    assert SCORES.read(ScoresResult, tmp_path) == some()


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))

    return apply


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (Path.unlink, "holds no scores.json"),
        (lambda file: file.write_text(file.read_text()[:400]), "is damaged"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda file: file.write_text("[1, 2]"), "is damaged"),
        (damage(lambda r: r.update(schema_version=99)), "schema version 99"),
        (damage(lambda r: r.update(kind="landscape")), "is 'landscape' of schema version 1"),
        (damage(lambda r: r.pop("adapters")), "is damaged"),
        (damage(lambda r: r.update(scorer="CLIP")), "is damaged"),
        (damage(lambda r: r["images"][0].pop("seed")), "is damaged"),
        (damage(lambda r: r["images"][0].update(adapter=2)), "is damaged"),
        (damage(lambda r: r["images"][0].update(prompt=-1)), "is damaged"),
        (damage(lambda r: r["images"][0].update(adapter="LoRA")), "is damaged"),
        (damage(lambda r: r["comparisons"][0].update(control=7)), "is damaged"),
        (damage(lambda r: r["summaries"][0].update(metric="fid")), "is damaged"),
        (damage(lambda r: r["comparisons"][0].update(interval=[0, 1])), "is damaged"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(
    spoil: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    SCORES.write(some(), tmp_path)
    spoil(tmp_path / SCORES.file)
    with pytest.raises(UserError, match=sentence) as refused:
        SCORES.read(ScoresResult, tmp_path)
    assert "\n" not in str(refused.value)
