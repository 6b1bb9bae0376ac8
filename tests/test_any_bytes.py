"""An input file of any bytes is read, or refused in one sentence."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.runs import RunItem, find_progress, run_name
from app.training_data import TrainingRun, charts, table
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.run.record import read_metrics
from bilora_diffusion.text.examples import open_file
from eval.clip_scores import prompts
from eval.sources import open_run

RUN = {"schema_version": 1, "method": "bilora", "status": "running", "config": {"rho": 0.05}}
KEYS = (
    "file_name",
    "text",
    "input",
    "output",
    "messages",
    "role",
    "content",
    "step",
    "loss",
    "heldout_loss",
    "method",
    "status",
    "config",
    "seed",
    "runs",
    "choice",
)
"""Keys that the readers look for."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda values: (
        st.lists(values, max_size=2) | st.dictionaries(st.sampled_from(KEYS), values, max_size=3)
    ),
    max_leaves=6,
)
# JSON lines, a run record with odd options, and traps: deep nesting, a long number, bad CSV rows.
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES, max_size=3)
TEXTS = (
    ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)))
    | VALUES.map(lambda values: json.dumps(RUN | {"config": values}))
    | st.sampled_from(["[" * 5000, "1" * 5000, "file_name,text\na.png", "input,output\na,b,c"])
)
CONTENT = st.binary(max_size=60) | TEXTS.map(str.encode)


def read_images(path):
    column = None if path.name.startswith("a.") else "text"
    open_images(str(path.parent), caption_column=column)


def read_run(path):
    """Read a run as the evaluations and the viewer do, and plot it."""
    folder = path.parent
    run = open_run(folder, "run")
    run.settings()
    lines = read_metrics(folder)
    record = dict(run.record)
    item = RunItem(".", run_name("run", record), record, None)
    state = find_progress(record, lines, 0.0, 0.0)
    training_run = TrainingRun(item, 0, lines, state)
    for curves in charts([training_run], 5).values():
        table(curves)


READERS: dict[str, Callable[[Any], object]] = {
    "metadata.jsonl": read_images,
    "metadata.csv": read_images,
    "a.txt": read_images,
    "a.png": read_images,
    "rows.jsonl": open_file,
    "rows.json": open_file,
    "rows.csv": open_file,
    "rows.parquet": open_file,
    "run.json": read_run,
    "metrics.jsonl": read_run,
    "prompts.csv": prompts.read,
}


@pytest.fixture
def folder(tmp_path):
    """Return a folder with two images and a run's record."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    return tmp_path


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=CONTENT)
def test_a_file_of_any_bytes_is_read_or_refused_in_one_sentence(name, content, folder):
    (folder / name).write_bytes(content)
    sentence = ""
    try:
        READERS[name](folder / name)
    except UserError as error:
        sentence = str(error)
    assert len(sentence.encode("utf-8", "replace")) < 2000
    assert "\n" not in sentence
