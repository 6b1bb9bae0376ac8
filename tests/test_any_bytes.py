"""Whatever the bytes of a file that others wrote: one sentence, or success."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.charts import Shown, charts, table
from app.runs import RunItem, named
from app.training_data import progress
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.run.record import Folds, Options, Record, read_folds, read_metrics
from bilora_diffusion.text.examples import open_file
from eval.clip_scores import prompts
from eval.sources import run as find_run
from eval.sweep import axes
from eval.tune import spaces

COLUMNS = ("file_name", "text", "instruction", "input", "output", "messages", "role", "content")
KEYS = st.sampled_from(COLUMNS) | st.text(max_size=3)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["a.png", "/", "..", "\ud800", "\0", "x" * 300, "1" * 5000]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
BEGINNINGS = (
    *(b'{"file_name": "a.png", "text": ', b'{"input": "a", "output": ', b'{"messages": '),
    *(b'[{"input": "a", "output": ', b"file_name,text\na.png,", b"input,output\na,", b""),
)
PIECES = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff"),
        *(b"file_name", b"text", b'"b"', b'"\\ud800"', b"1" * 5000, b"1e999", b"[" * 5000),
        *(b'"' + b"x" * 140_000 + b'"', *BEGINNINGS),
    ]
)
ALMOST = st.tuples(
    st.sampled_from(BEGINNINGS), PIECES, st.sampled_from([b"", b"}", b"}]", b"\n"])
).map(b"".join)


def rows() -> st.SearchStrategy[bytes]:
    """JSON that parses, an object on each line or a list of them, and holds any types."""
    objects = st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=3)
    lines = objects.map(lambda found: "\n".join(map(json.dumps, found)))
    return (lines | objects.map(json.dumps)).map(str.encode)


CONTENT = st.binary(max_size=60) | st.lists(PIECES, max_size=9).map(b"".join) | ALMOST | rows()


def any_bytes(check: Any) -> Callable[..., None]:
    """Give a test the same hundred contents in every run."""
    kept = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    repeatable = settings(
        max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=kept
    )
    check = repeatable(given(content=CONTENT)(check))
    for start in BEGINNINGS:
        for value in (b"1" * 5000, b"[" * 5000, b'"\\ud800"}', b"x" * 140_000):
            check = example(content=start + value)(check)
    return check


def survives(work: Callable[[], object]) -> None:
    """It succeeds, or says in one sentence what to mend."""
    sentence = ""
    try:
        work()
    except UserError as error:
        sentence = str(error)
    assert len(sentence.encode()) < 2000
    assert "\n" not in sentence


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt", "a.png"])
@any_bytes
def test_a_folder_of_images(name: str, content: bytes, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / name).write_bytes(content)
    column = None if name.startswith("a.") else "text"
    survives(lambda: open_images(str(tmp_path), caption_column=column).prompts("TOK"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@any_bytes
def test_a_file_of_rows(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)

    def read() -> None:
        for row in open_file(path):
            row.question.encode()
            row.answer.encode()

    survives(read)


NUMBERS = st.integers(-1, 2**54) | st.floats() | st.sampled_from([1e308, 5e-324, 10**400])
ODD = VALUES | NUMBERS | st.lists(NUMBERS | st.none(), max_size=3)
RECORD: dict[str, Any] = {"method": "bilora", "status": "running", "config": {"rho": 0.05}}
STEP = (
    "step",
    "loss",
    "heldout_loss",
    "heldout_loss_by_level/25",
    "lr",
    "rho",
    "seconds",
    "digest",
)
CURVES = {"settings": {}, "steps": [0], "folds": [[1.0]], "mean": [1.0], "chosen_steps": 1}
RANGES = st.sampled_from(["log", "uniform", "choice"])
PLAIN = st.sampled_from(["lora", "0.1", "1e-3", "5", "nan", "1e999", "a..b"]) | VALUES
SPACE = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("options", "shared", "methods", "lora"),
        VALUES
        | st.dictionaries(
            st.sampled_from(["method", "rank", "seed", "LoRA"]),
            PLAIN
            | st.dictionaries(RANGES, st.lists(PLAIN, max_size=3), max_size=2)
            | st.dictionaries(st.sampled_from(["method", "rho"]), PLAIN, max_size=2),
            max_size=3,
        ),
    ),
)


def odd(names: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the names with a value of any kind."""
    return st.dictionaries(st.sampled_from(sorted(names)), ODD, max_size=3)


def within_a_second(content: st.SearchStrategy[Any]) -> Callable[[Any], Callable[..., None]]:
    """Give a test the same fifty contents in every run, and a second for each."""
    kept = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    repeatable = settings(
        max_examples=50, derandomize=True, deadline=1000, database=None, suppress_health_check=kept
    )
    return lambda check: repeatable(given(content=content)(check))


def look(folder: Path) -> None:
    """Read a run as evaluation and viewer do, and draw it."""
    run = find_run(folder, "run")
    run.settings()
    lines = read_metrics(folder)
    (item,) = named([RunItem(".", "run", dict(run.record), None)])
    assert len(item.images) <= 10_000
    state = progress(run.record, lines, 0.0, 0.0)
    shown = Shown(item, 0, lines, state, read_folds(folder / "folds.json") or {})
    for curves in charts([shown], 5).values():
        table(curves)


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported at first use takes more than a second."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, **RECORD}))
    look(folder)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "folds.json"])
@any_bytes
def test_a_run_of_any_bytes(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, **RECORD}))
    (tmp_path / name).write_bytes(content)
    survives(lambda: look(tmp_path))


@within_a_second(st.tuples(odd(Record.model_fields), odd(Options.model_fields)))
def test_a_record_of_any_values(content: tuple[Any, Any], tmp_path: Path) -> None:
    record, config = content
    whole = {"schema_version": 1, **RECORD, "config": config, **record}
    (tmp_path / "run.json").write_text(json.dumps(whole))
    survives(lambda: look(tmp_path))


@within_a_second(st.lists(odd(STEP).map(lambda line: {"step": 1, "loss": 1} | line), max_size=4))
def test_metrics_of_any_values(content: list[Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, **RECORD}))
    lines = "".join(f"{json.dumps(line)}\n" for line in content)
    (tmp_path / "metrics.jsonl").write_text(lines)
    survives(lambda: look(tmp_path))


@within_a_second(odd(Folds.model_fields))
def test_folds_of_any_values(content: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, **RECORD}))
    (tmp_path / "folds.json").write_text(json.dumps(CURVES | content))
    survives(lambda: look(tmp_path))


@pytest.mark.parametrize("suffix", ["txt", "csv"])
@any_bytes
def test_a_file_of_prompts(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(content)
    survives(lambda: prompts.read(path))


def read_space(path: Path) -> None:
    """Read a file of ranges, and draw from each."""
    space = spaces.load(path)
    for method in space.methods:
        space.configuration(method, 0, 0)


@pytest.mark.parametrize("read", [read_space, axes.load_arms])
@any_bytes
def test_a_space_or_arms_of_any_bytes(
    read: Callable[[Path], Any], content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_bytes(content)
    survives(lambda: read(tmp_path / "space.yaml"))


@pytest.mark.parametrize("read", [read_space, axes.load_arms])
@within_a_second(SPACE | VALUES)
def test_a_space_or_arms_of_any_values(
    read: Callable[[Path], Any], content: Any, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(json.dumps(content))
    survives(lambda: read(tmp_path / "space.yaml"))


@within_a_second(
    st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)
    | st.from_regex(r"[a-z]+=-?[0-9.,]{1,40}", fullmatch=True)
)
def test_an_axis_of_any_text(content: str, tmp_path: Path) -> None:
    survives(lambda: axes.axes([content]))
