"""Prompt sets: shipped sets, text files with one prompt per line, CSV files, and captions of
held-out images.

read("3d_icon")                      # the paper's instances and 194 more (Table 4)
read("my_prompts.csv")
read("mini-duotone-heldout")         # 128 captions, each with the picture that it describes

``eval/prompts/NAME.txt`` is a shipped set. ``3d_icon_references.csv`` in the same folder names the
miniature's held-out picture of an instance, if there is one. ``contexts.txt`` is not a prompt set:
it has contexts for a run's instance prompt; see `defaults`.
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
# The paper's prompts and further ones like them
ICON_PROMPTS = "3d_icon"
# Column with the prompts in a CSV file, and in the metadata of held-out images
PROMPT = "prompt"
# Maximum size of a text file with prompts, in bytes
MAX_BYTES = 100_000_000
# Matches "of a Fluffy Rabbit, ..."
_INSTANCE = re.compile(r"\bof an? ([^,]+)")


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    # Full text that the model gets
    text: str
    # Short title of the prompt in tables: its subject, such as "Fluffy Rabbit", or its context;
    # None if unknown
    instance: str | None = None
    # Held-out picture for the prompt; with ``colors`` applied, it has the trained style. Pictures
    # of the shipped sets belong to the miniature and are not used for other base models.
    reference: Path | None = None
    # Whether the prompt is unrelated to the training images, so its images should not change
    general: bool = False
    # Name in ``mini.colors.MAPS`` of the color map that is applied to the reference; None if the
    # reference is used as it is
    colors: str | None = None


def shipped_names() -> tuple[str, ...]:
    """Return the names of the sets in ``eval/prompts``."""
    names = {path.stem for path in FOLDER.glob("*.txt")} - {CONTEXTS}
    return tuple(sorted(names))


def read(source: str | Path) -> list[Prompt]:
    """Read the prompts of a set, in order.

    Args:
        source: one of

            - the name of a shipped set;
            - a text file; blank lines and lines that start with # are skipped;
            - a CSV file with a header and the column ``prompt``; the columns ``instance`` and
              ``reference`` (a path relative to the CSV file) are optional;
            - held-out images, as a built-in set or a folder; their captions are the prompts, and
              the images are the references.

    Raises:
        UserError: there is no such set, it is empty or damaged, it lacks the column of prompts, a
            caption or a reference, or it repeats a prompt.
    """
    name = str(source)
    is_shipped = name in shipped_names()
    heldout_names = [folder for folder in FOLDERS if folder.endswith(HELDOUT_SUFFIX)]
    path = Path(source).expanduser()
    if is_shipped:
        path = FOLDER / f"{name}.txt"
    if name in heldout_names:
        prompts = _of_images(FOLDERS[name], name)
    elif path.is_dir():
        prompts = _of_images(path, name)
    elif not is_file(path):
        hint = did_you_mean(name, [*shipped_names(), CONTEXTS, *heldout_names])
        raise UserError(
            f'there is no prompt set and no file "{name}"{hint}: give {", ".join(shipped_names())},'
            f" a text file, a CSV, or held-out images with captions, such as {heldout_names[0]} or"
            " a folder."
        )
    elif path.suffix.lower() == ".csv":
        prompts = _of_csv(path, name)
    else:
        prompts = []
        for number, text in numbered_lines(path, name):
            prompts.append((f"line {number}", Prompt(text, instance_of(text))))
    if not prompts:
        raise UserError(f"{name} contains no prompt: write one per line.")
    # Images are stored and compared by the prompt's text, so each text must be unique.
    first_places: dict[str, str] = {}
    for place, prompt in prompts:
        first_place = first_places.setdefault(prompt.text, place)
        if first_place != place:
            raise UserError(
                f'{name} has the prompt "{prompt.text[:200]}" twice ({first_place} and {place}):'
                " remove or change one of them."
            )
    plain = [prompt for _, prompt in prompts]
    if is_shipped:
        return _with_references(name, plain)
    return plain


def numbered_lines(path: Path, name: str) -> list[tuple[int, str]]:
    """Read the lines that are neither blank nor a comment (# at the start): (number, text)."""
    lines = []
    for number, line in enumerate(read_text(path, name, MAX_BYTES).splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            lines.append((number, text))
    return lines


def instance_of(text: str) -> str | None:
    """Return the instance of a prompt "... of a INSTANCE, ..."; None for other prompts."""
    match = _INSTANCE.search(text)
    return match[1].strip() if match else None


def _of_csv(path: Path, name: str) -> list[tuple[str, Prompt]]:
    """Read the prompts of a CSV file, each with its place in the file for error messages."""
    rows = read_rows(path, name)
    if rows and PROMPT not in rows[0][1]:
        hint = did_you_mean(PROMPT, rows[0][1])
        raise UserError(f'{name} has no column "{PROMPT}"{hint}: rename the prompt column.')
    prompts = []
    for place, row in rows:
        text = row[PROMPT].strip()
        if not text:
            raise UserError(f'{place} has no "{PROMPT}": write it or remove the line.')
        instance = (row.get("instance") or "").strip() or instance_of(text)
        reference = (row.get("reference") or "").strip()
        file = None
        if reference:
            file = path.parent / Path(reference).expanduser()
            if not file.is_file():
                raise UserError(
                    f'{place} has the reference "{reference[:200]}", which does not exist: correct'
                    " it or leave it empty."
                )
        prompts.append((place, Prompt(text, instance, file)))
    return prompts


def _of_images(folder: Path, name: str) -> list[tuple[str, Prompt]]:
    """Read the captions of a folder's images as prompts; each image is its prompt's reference."""
    column = None
    for metadata in list_folder(folder).metadata:
        rows = read_rows(metadata)
        first_row = rows[0][1] if rows else {}
        if PROMPT in first_row:
            column = PROMPT
        elif TEXT in first_row:  # the caption column of ``imagefolder`` in Hugging Face datasets
            column = TEXT
        else:
            raise UserError(f'{metadata} has no column "{PROMPT}": rename the caption column.')
    prompts = []
    for entry in open_images(str(folder), caption_column=column).entries:
        file = entry.encoded_image()
        if entry.caption is None or isinstance(file, bytes):  # bytes: a set without files
            lack = "no caption" if entry.caption is None else "no file of its own"
            raise UserError(
                f"the image {entry.name} of {name} has {lack}: give a folder of images, each with a"
                " caption in metadata.jsonl or in a .txt file."
            )
        text = entry.caption.strip()
        prompts.append((entry.name, Prompt(text, instance_of(text), file, colors=color_map(name))))
    return prompts


def _with_references(name: str, prompts: list[Prompt]) -> list[Prompt]:
    """Add the reference pictures to the prompts of a shipped set, and mark the general set."""
    table = FOLDER / f"{name}_references.csv"
    references = {}
    if table.is_file():
        for _, row in read_rows(table):
            references[row["instance"]] = heldout_dir() / row["reference"]
    completed = []
    for prompt in prompts:
        reference = references.get(prompt.instance or "")
        completed.append(replace(prompt, reference=reference, general=name == GENERAL))
    return completed
