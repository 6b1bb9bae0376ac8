"""Files of any bytes that others wrote: one sentence, or success."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.runs import RunItem, label, progress
from app.training_data import Shown, charts, table
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.run.record import Options, Record, SearchRecord, read_metrics, read_search
from bilora_diffusion.text.examples import open_file
from eval.clip_scores import prompts
from eval.sources import run as find_run
from eval.sweep import axes

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
SURPRISES = (b"1" * 5000, b"[" * 5000, b'"\\ud800"}', b"x" * 140_000)
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
OBJECTS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=3)
ROWS = OBJECTS.map(lambda found: "\n".join(map(json.dumps, found))) | OBJECTS.map(json.dumps)
CONTENT = st.binary(max_size=60) | st.lists(PIECES, max_size=9).map(b"".join) | ALMOST
CONTENT |= ROWS.map(str.encode)
NUMBERS = st.integers(-1, 2**54) | st.floats() | st.sampled_from([1e308, 5e-324, 10**400])
ODD = VALUES | NUMBERS | st.lists(NUMBERS | st.none(), max_size=3)
RUN: dict[str, Any] = {"schema_version": 1, "method": "bilora", "status": "running"}
RUN["config"] = {"rho": 0.05}
LOSSES = ("loss", "heldout_loss", "heldout_loss_by_level/25")
STEP = ("step", *LOSSES, "lr", "rho", "seconds", "digest")
FIT: dict[str, Any] = {"settings": {}, "spent": 0, "runs": [], "out": {}, "choice": None}
FIT["standings"] = []
VARIANT = st.dictionaries(st.sampled_from(["method", "rank", "seed", "rho"]), VALUES)
VARIANTS = st.dictionaries(st.sampled_from(["lora", "LoRA", "options"]), VARIANT | VALUES)


def odd(names):
    """Some of the names with a value of any kind."""
    return st.dictionaries(st.sampled_from(sorted(names)), ODD, max_size=3)


def read_images(path):
    column = None if path.name.startswith("a.") else "text"
    open_images(str(path.parent), caption_column=column).prompts("TOK")


def read_rows(path):
    for row in open_file(path):
        row.question.encode()
        row.answer.encode()


def read_run(path):
    """Read a run as evaluation and viewer do, and draw it."""
    folder = path.parent
    run = find_run(folder, "run")
    run.settings()
    lines = read_metrics(folder)
    record = dict(run.record)
    item = RunItem(".", label("run", record), record, None)
    assert len(item.images) <= 10_000
    state = progress(run.record, lines, 0.0, 0.0)
    shown = Shown(item, 0, lines, state, read_search(folder / "fit.json") or {})
    for curves in charts([shown], 5).values():
        table(curves)


READERS: list[tuple[str, Callable[[Path], object]]] = [
    *((name, read_images) for name in ("metadata.jsonl", "metadata.csv", "a.txt", "a.png")),
    *((f"rows.{suffix}", read_rows) for suffix in ("jsonl", "json", "csv", "parquet")),
    *((name, read_run) for name in ("run.json", "metrics.jsonl", "fit.json")),
    *((name, prompts.read) for name in ("prompts.txt", "prompts.csv")),
]
ANY_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "run.json": st.tuples(odd(Options.model_fields), odd(Record.model_fields)).map(
        lambda pair: {**RUN, "config": pair[0], **pair[1]}
    ),
    "metrics.jsonl": st.lists(
        odd(STEP).map(lambda line: {"step": 1, "loss": 1} | line), max_size=4
    ),
    "fit.json": odd(SearchRecord.model_fields).map(lambda fit: FIT | fit),
    "variants.yaml": VARIANTS | VALUES,
}


SETTINGS = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def survives(read):
    """Succeeds, or says in one sentence what to mend."""
    sentence = ""
    try:
        read()
    except UserError as error:
        sentence = str(error)
    assert len(sentence.encode()) < 2000
    assert "\n" not in sentence


@pytest.fixture
def folder(tmp_path):
    """A folder of two images, and of a run."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    return tmp_path


@pytest.mark.parametrize(("name", "read"), READERS)
@SETTINGS
@given(content=CONTENT)
def test_a_file_of_any_bytes(name, read, content, folder):
    (folder / name).write_bytes(content)
    survives(lambda: read(folder / name))


@pytest.mark.parametrize(("name", "read"), READERS)
def test_what_has_been_a_surprise(name, read, folder):
    for start, end in itertools.product(BEGINNINGS, SURPRISES):
        (folder / name).write_bytes(start + end)
        survives(lambda: read(folder / name))


@pytest.mark.parametrize(
    ("name", "read"),
    [("variants.yaml", axes.load_variants), *(r for r in READERS if r[0] in ANY_VALUES)],
)
@SETTINGS
@given(data=st.data())
def test_a_file_of_any_values(name, read, data, folder):
    content = data.draw(ANY_VALUES[name])
    rows = content if name.endswith(".jsonl") else [content]
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    survives(lambda: read(folder / name))


@SETTINGS
@given(
    content=st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)
    | st.from_regex(r"[a-z]+=-?[0-9.,]{1,40}", fullmatch=True)
)
def test_an_axis_of_any_text(content):
    survives(lambda: axes.axes([content]))
