"""Local files: JSONL, JSON, CSV and Parquet, and each way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bilora_diffusion.errors import UserError
from bilora_diffusion.text.examples import (
    Example,
    from_turns,
    label_words_of,
    subset,
    with_labels,
)
from bilora_diffusion.text.files import open_file

ROWS = [{"question": 'Say "a, b".\nNow \u2028', "answer": "ä 🍎"}, {"question": "x", "answer": "y"}]


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"train{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        quoted = [[str(v).replace('"', '""') for v in row.values()] for row in rows]
        lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row) for row in quoted)]
        path.write_bytes("\n".join(lines).encode())
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes(("\ufeff" + "\n".join([*lines, ""])).encode())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_each_format_gives_the_same_examples(suffix: str, tmp_path: Path) -> None:
    found = open_file(write(tmp_path, suffix, ROWS))
    assert found == [Example(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations(suffix: str, tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path, suffix, [{"messages": messages}, {"messages": messages[1:3]}])
    first, second = open_file(path, input_column="auto", target_column="auto")
    assert first == Example("u", "a", turns=tuple(turns[:3]))
    assert second == Example("u", "a")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "1", "prompt": "p", "completion": "c"}, ("p", "c")),
        ({"sentence": "s", "label": 3}, ("s", "3")),
        ({"text": "t", "label": True}, ("t", "True")),
        ({"input": "i", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": "j", "output": "o"}, ("i\n\nj", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, ("i", "o")),
        ({"instruction": "i", "context": "j", "response": "o"}, ("i\n\nj", "o")),
    ],
)
def test_columns_are_found_by_name(
    row: dict[str, Any], expected: tuple[str, str], tmp_path: Path
) -> None:
    (found,) = open_file(write(tmp_path, ".jsonl", [row]))
    assert (found.question, found.answer) == expected
    assert found.input == (row.get("input", row.get("context")) or "") * ("instruction" in row)


def test_named_columns_go_before_usual_ones(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", [{"input": "i", "output": "o", "a": "x", "b": "y"}])
    assert open_file(path, input_column="a", target_column="b") == [Example("x", "y")]
    assert open_file(path, input_column="a") == [Example("x", "o")]


GOOD = b'{"input": "a", "output": "b"}\n'
BROKEN: list[tuple[str, bytes, str]] = [
    ("t.jsonl", b"", "t.jsonl has no rows"),
    ("t.json", b" \n", "t.json has no rows"),
    ("t.json", b"[]", "t.json has no rows"),
    ("t.csv", b"input,output\n", "t.csv has no rows"),
    ("t.jsonl", GOOD + b'{"input": "\xe4"}\n', r"line 2 of t.jsonl is not UTF-8 \(byte 0xe4\)"),
    ("t.csv", "input,output\nä,ö\n".encode() + b"\xfc,x\n", "line 3 of t.csv is not UTF-8"),
    ("t.json", '[{"input": "a"}]'.encode("utf-16"), "line 1 of t.json is not UTF-8"),
    ("t.jsonl", GOOD + b"{oops}\n", "line 2 of t.jsonl is not JSON"),
    ("t.jsonl", GOOD + b'["a", "b"]\n', "line 2 of t.jsonl is a list, not a JSON object"),
    ("t.json", b'[{"input": "a", "output": "b"}, 3]', "row 2 of t.json is a number, not a JSON"),
    ("t.json", b'{"data": []}', "t.json holds an object, not a list of objects"),
    ("t.json", GOOD * 2, "t.json is not JSON .*name files with one object a line .jsonl"),
    ("t.csv", b"input,output\na,b,c\n", "line 2 of t.csv does not have 2 fields"),
    ("t.csv", b"input,output\na\n", "line 2 of t.csv does not have 2 fields"),
    ("t.csv", b'input,output\na,"b\n', "line 2 of t.csv: unexpected end of data"),
    ("t.parquet", b"PAR1 no", "t.parquet can't be read as Parquet"),
    ("t.jsonl", b'{"a": "x", "output": "y"}', r"no column named input, .* columns \(a, output\)"),
    ("t.jsonl", b'{"input": "x", "b": "y"}', r"no column named target, .* columns \(input, b\)"),
    ("t.jsonl", GOOD + b'{"input": "a"}', 'line 2 of t.jsonl has no "output", as others have'),
    ("t.jsonl", GOOD + b'{"input": null, "output": "b"}', '"input" of line 2 of t.jsonl is empty'),
    ("t.jsonl", GOOD + b'{"input": "a", "output": ["b"]}', '"output" of line 2 of t.jsonl is a li'),
    ("t.jsonl", b'{"input": 3, "output": "b"}', '"input" of line 1 of t.jsonl is a number'),
    ("t.jsonl", b'{"messages": "hi"}', "no column named target"),
    ("t.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "no turn of the assistant"),
    ("t.jsonl", b'{"messages": [{"role": "user"}]}', 'turn 1 of line 1 of t.jsonl has no "role"'),
    ("t.jsonl", b'{"messages": ["a"]}', 'turn 1 of line 1 of t.jsonl has no "role"'),
    ("t.jsonl", b'{"messages": [{}]}\n{"messages": 3}', "turn 1 of line 1"),
    ("t.txt", b"hello", "is none of .jsonl, .json, .csv, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BROKEN)
def test_broken_files_are_refused(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_file(tmp_path / name)


def test_a_missing_file_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*gone.jsonl"):
        open_file(tmp_path / "gone.jsonl")
    path = write(tmp_path, ".jsonl", [{"input": "i", "output": "o"}])
    with pytest.raises(
        UserError, match=r'no column "x": set --input_column to one .* \(input, output\)'
    ):
        open_file(path, input_column="x")
    with pytest.raises(UserError, match='no column "y": set --target_column'):
        open_file(path, target_column="y")


def test_label_words_are_the_answers_in_order() -> None:
    assert label_words_of([Example("", a) for a in ("b", "a", "b")]) == ("a", "b")
    assert label_words_of([Example("", a) for a in ("10", "9", "-1")]) == ("-1", "9", "10")
    labelled = with_labels([Example("x", "b"), Example("y", "a")], ("a", "b"), "t.csv")
    assert [example.label for example in labelled] == [1, 0]


def test_an_answer_that_is_no_label_word_is_refused() -> None:
    examples = [Example("x", "yes"), Example("y", "yess")]
    with pytest.raises(
        UserError, match=r'the label "yess" of row 2 of t.csv .* \(did you mean "yes"\?\)'
    ):
        with_labels(examples, ("no", "yes"), "t.csv")


def test_a_subset_is_drawn_by_its_seed() -> None:
    examples = [Example(str(i), "") for i in range(50)]
    assert subset(examples, None, 0, "train") == subset(examples, 50, 0, "train") == examples
    first = subset(examples, 10, 0, "train")
    assert first == subset(examples, 10, 0, "train") == sorted(first, key=lambda e: int(e.prompt))
    assert first != subset(examples, 10, 1, "train")
    assert first != subset(examples, 10, 0, "validation")


def test_turns_after_the_last_answer_are_left_out() -> None:
    talk = from_turns([("user", "a"), ("assistant", "b"), ("user", "c")], "row 1")
    assert talk == Example("a", "b")
    with pytest.raises(UserError, match="row 1 has no turn of the assistant that answers"):
        from_turns([("assistant", "hello")], "row 1")
