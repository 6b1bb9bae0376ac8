"""Prompt sets: those that are shipped, a text file with one prompt a line, or a CSV.

read("3d_icon")                      # the paper's instances and 194 more (Table 4)
read("my_prompts.csv", "caption")

``eval/prompts/NAME.txt`` is a shipped set; ``NAME_references.csv`` beside it names, for an instance
of the set, the miniature's held-out picture of it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.mini import heldout_dir
from bilora_diffusion.text_file import is_file, is_folder

FOLDER = Path(__file__).resolve().parents[1] / "prompts"
GENERAL = "general"
_INSTANCE = re.compile(r"\bof an? ([^,]+)")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text: as the model gets it.
        instance: what it asks for, such as "Fluffy Rabbit"; None where the text does not say.
        reference: a picture of it in the style that was trained. Those of the shipped sets belong
            to the miniature, and mean nothing for another base model.
        general: asks for nothing that was trained, so its images should stay as they were.
    """

    text: str
    instance: str | None = None
    reference: Path | None = None
    general: bool = False


def shipped() -> tuple[str, ...]:
    """The names of the sets in ``eval/prompts``."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def read(source: str | Path, column: str | None = None) -> list[Prompt]:
    """The prompts of a set, in its order.

    Args:
        source: name of a shipped set, a text file (blank lines and lines that start with # are
            left out), or a CSV with a header. A CSV may have the columns ``instance`` and
            ``reference``; a reference is relative to the CSV.
        column: the CSV's column of prompts; "prompt" by default.

    Raises:
        UserError: an unknown set, a file that is missing, empty or not UTF-8, no such column, a
            prompt that is there twice, or a reference that is not there.
    """
    name = str(source)
    is_shipped = name in shipped()
    path = FOLDER / f"{name}.txt" if is_shipped else Path(source).expanduser()
    lines = _lines(path, name)
    if path.suffix.lower() == ".csv":
        try:
            rows = list(_csv_prompts(path, lines, column or "prompt"))
        except csv.Error as error:
            raise UserError(f"{name} is no CSV ({error}): correct its quotes.") from error
    elif column is not None:
        raise UserError(
            f'{name} is not a CSV and has no column "{column}": drop the column, or give a CSV.'
        )
    else:
        rows = list(_text_prompts(lines))
    if not rows:
        raise UserError(f"{name} holds no prompt: write one a line.")
    _refuse_duplicates(name, rows)
    prompts = [prompt for _, prompt in rows]
    return _with_references(name, prompts) if is_shipped else prompts


def _lines(path: Path, name: str) -> list[str]:
    if is_folder(path):
        raise UserError(f"{name} is a folder: name a text file or a CSV with prompts.")
    try:
        if path.exists() and not is_file(path):
            raise UserError(f"{name} is a device or a pipe: name a text file or a CSV.")
        data = path.read_bytes()
    except FileNotFoundError as error:
        known = shipped()
        raise UserError(
            f'there is no prompt set and no file "{name}"{did_you_mean(name, known)}: give'
            f" {', '.join(known)}, a text file or a CSV."
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): check its rights.") from error
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"line {number} of {name} is not UTF-8: save the file as UTF-8 text."
            ) from error
        if "\0" in lines[-1]:
            raise UserError(
                f"line {number} of {name} has a zero byte, so the file is no UTF-8 text: save it"
                " as such."
            )
    return lines


def _text_prompts(lines: list[str]) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, Prompt(text, instance_of(text))


def instance_of(text: str) -> str | None:
    """What a prompt of the form "... of a INSTANCE, ..." asks for; None for another form."""
    match = _INSTANCE.search(text)
    return match[1].strip() if match else None


def _csv_prompts(path: Path, lines: list[str], column: str) -> Iterator[tuple[int, Prompt]]:
    reader = csv.DictReader(io.StringIO("\n".join(lines), newline=""))
    columns = list(reader.fieldnames or ())
    if not columns:
        raise UserError(f"{path} is empty: write a header and one prompt a line.")
    if column not in columns:
        raise UserError(
            f'{path} has no column "{column}"{did_you_mean(column, columns)}: it has'
            f" {', '.join(columns)}."
        )
    for row in reader:
        number = reader.line_num
        if None in row or None in row.values():
            raise UserError(
                f"line {number} of {path} does not have {len(columns)} fields as its header has:"
                " quote fields that contain a comma."
            )
        text = row[column].strip()
        if not text:
            raise UserError(
                f'line {number} of {path} has no "{column}": write it or drop the line.'
            )
        instance = (row.get("instance") or "").strip() or instance_of(text)
        yield number, Prompt(text, instance, _reference(path, number, row.get("reference")))


def _reference(path: Path, number: int, value: str | None) -> Path | None:
    name = (value or "").strip()
    if not name:
        return None
    file = path.parent / Path(name).expanduser()
    if not file.is_file():
        raise UserError(
            f'line {number} of {path} has the reference "{name}", which is not there: correct it'
            " or leave it empty."
        )
    return file


def _refuse_duplicates(name: str, rows: list[tuple[int, Prompt]]) -> None:
    seen: dict[str, int] = {}
    for number, prompt in rows:
        if prompt.text in seen:
            raise UserError(
                f"lines {seen[prompt.text]} and {number} of {name} have the same prompt,"
                f' "{prompt.text}": drop one of them.'
            )
        seen[prompt.text] = number


def _with_references(name: str, prompts: list[Prompt]) -> list[Prompt]:
    table = FOLDER / f"{name}_references.csv"
    known: dict[str, Path] = {}
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                known[row["instance"]] = heldout_dir() / row["reference"]
    return [
        Prompt(
            prompt.text,
            prompt.instance,
            known.get(prompt.instance or ""),
            general=name == GENERAL,
        )
        for prompt in prompts
    ]
