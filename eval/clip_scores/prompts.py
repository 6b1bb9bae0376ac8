"""Prompt sets: those that are shipped, a text file with one prompt a line, a CSV, or the captions
of held-out images.

read("3d_icon")                      # the paper's instances and 194 more (Table 4)
read("my_prompts.csv")
read("mini-duotone-heldout")         # 128 captions, each with the picture that it describes

``eval/prompts/NAME.txt`` is a shipped set; ``NAME_references.csv`` beside it names, for an instance
of the set, the miniature's held-out picture of it. ``contexts.txt`` holds no prompts but places for
the instance prompt of a run, see `defaults`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.files import is_file, read_rows, read_text
from bilora_diffusion.image.image_files import list_folder
from bilora_diffusion.image.opening import TEXT, open_images
from bilora_diffusion.mini import FOLDERS, HELDOUT_SUFFIX, color_map, heldout_dir

FOLDER = Path(__file__).resolve().parents[1] / "prompts"
GENERAL = "general"
CONTEXTS = "contexts"
PROMPT = "prompt"
"""The column of the prompts in a CSV file, and in the metadata of held-out images."""
MOST_BYTES = 100_000_000
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
        colors: the map of ``mini.colors.MAPS`` through which the reference is seen.
    """

    text: str
    instance: str | None = None
    reference: Path | None = None
    general: bool = False
    colors: str | None = None


def shipped() -> tuple[str, ...]:
    """The names of the sets in ``eval/prompts``."""
    names = {path.stem for path in FOLDER.glob("*.txt")} - {CONTEXTS}
    return tuple(sorted(names))


def read(source: str | Path) -> list[Prompt]:
    """The prompts of a set, in its order.

    Args:
        source: name of a shipped set, a text file (blank lines and lines that start with # are
            left out), or a CSV with a header and the column ``prompt``. It may have the columns
            ``instance`` and ``reference`` too; a reference is relative to the CSV. Or a set of
            held-out images, built in or a folder, whose captions are the prompts and whose images
            are their references.
    """
    name = str(source)
    is_shipped = name in shipped()
    heldout_names = [folder for folder in FOLDERS if folder.endswith(HELDOUT_SUFFIX)]
    path = FOLDER / f"{name}.txt" if is_shipped else Path(source).expanduser()
    if name in heldout_names:
        prompts = _of_images(FOLDERS[name], name)
    elif path.is_dir():
        prompts = _of_images(path, name)
    elif not is_file(path):
        hint = did_you_mean(name, [*shipped(), CONTEXTS, *heldout_names])
        raise UserError(
            f'there is no prompt set and no file "{name}"{hint}: give {", ".join(shipped())}, a'
            f" text file, a CSV, or held-out images with captions, such as {heldout_names[0]} or"
            " a folder."
        )
    else:
        prompts = (_of_csv if path.suffix.lower() == ".csv" else _of_text)(path, name)
    if not prompts:
        raise UserError(f"{name} holds no prompt: write one a line.")
    first: dict[str, str] = {}
    for where, prompt in prompts:
        first_place = first.setdefault(prompt.text, where)
        if first_place != where:
            raise UserError(
                f'{name} has the prompt "{prompt.text[:200]}" at {first_place} and at {where}: drop'
                " one of them."
            )
    plain = [prompt for _, prompt in prompts]
    return _with_references(name, plain) if is_shipped else plain


def _of_text(path: Path, name: str) -> list[tuple[str, Prompt]]:
    lines = _numbered(path, name)
    return [(f"line {number}", Prompt(text, instance_of(text))) for number, text in lines]


def lines_of(path: Path, name: str) -> list[str]:
    """The lines of a text file that are neither blank nor a comment, which starts with #."""
    return [text for _, text in _numbered(path, name)]


def _numbered(path: Path, name: str) -> list[tuple[int, str]]:
    lines = []
    for number, line in enumerate(read_text(path, name, MOST_BYTES).splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            lines.append((number, text))
    return lines


def instance_of(text: str) -> str | None:
    """Instance of a prompt of the form "... of a INSTANCE, ..."; None for another form."""
    match = _INSTANCE.search(text)
    return match[1].strip() if match else None


def _of_csv(path: Path, name: str) -> list[tuple[str, Prompt]]:
    rows = read_rows(path, name)
    if rows and PROMPT not in rows[0][1]:
        hint = did_you_mean(PROMPT, rows[0][1])
        raise UserError(f'{name} has no column "{PROMPT}"{hint}: name that of the prompts so.')
    prompts = []
    for where, row in rows:
        text = row[PROMPT].strip()
        if not text:
            raise UserError(f'{where} has no "{PROMPT}": write it or drop the line.')
        instance = (row.get("instance") or "").strip() or instance_of(text)
        reference = (row.get("reference") or "").strip()
        file = path.parent / Path(reference).expanduser() if reference else None
        if file and not file.is_file():
            raise UserError(
                f'{where} has the reference "{reference[:200]}", which is not there: correct it or'
                " leave it empty."
            )
        prompts.append((where, Prompt(text, instance, file)))
    return prompts


def _of_images(folder: Path, name: str) -> list[tuple[str, Prompt]]:
    """The captions of a folder's images, each with its image as the reference."""
    # Captions of a metadata file are in the column that a CSV of prompts has, or in imagefolder's.
    column = None
    for metadata in list_folder(folder).metadata:
        (_, row), *_ = read_rows(metadata) or [("", {})]
        column = next((key for key in (PROMPT, TEXT) if key in row), None)
        if column is None:
            raise UserError(f'{metadata} has no column "{PROMPT}": name that of the captions so.')
    prompts = []
    for entry in open_images(str(folder), caption_column=column).entries:
        file = entry.encoded()
        if entry.caption is None or isinstance(file, bytes):
            lack = "no caption" if entry.caption is None else "no file of its own"
            raise UserError(
                f"the image {entry.name} of {name} has {lack}: give a folder of images, each with a"
                " caption in metadata.jsonl or in a .txt file."
            )
        text = entry.caption.strip()
        prompts.append((entry.name, Prompt(text, instance_of(text), file, colors=color_map(name))))
    return prompts


def _with_references(name: str, prompts: list[Prompt]) -> list[Prompt]:
    table = FOLDER / f"{name}_references.csv"
    rows = [row for _, row in read_rows(table)] if table.is_file() else []
    references = {row["instance"]: heldout_dir() / row["reference"] for row in rows}
    described = []
    for prompt in prompts:
        reference = references.get(prompt.instance or "")
        described.append(replace(prompt, reference=reference, general=name == GENERAL))
    return described
