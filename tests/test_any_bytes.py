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

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.text.examples import open_file

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
