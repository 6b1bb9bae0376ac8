"""Types of a run's files, ``run.json`` and ``metrics.jsonl``, and their readers.

All code that reads a run (resume, guard, evaluation, viewer) reads it here, and relies on these
types. A value that does not fit them makes the run unreadable, with the reason in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.durable import discard
from ..core.errors import UserError
from ..core.files import regular_file
from ..core.values import TRAINING_GRID_LOSS

SCHEMA_VERSION = 1
RUN, METRICS = "run.json", "metrics.jsonl"
VALIDATION = "validation"
# Picture of the training images, as training crops them.
CONTACT_SHEET = "training_images.png"
# Stands before a concept's name in the name of its held-out loss.
BY_CONCEPT = "heldout_loss_by_concept/"
# Validation images of one prompt at most, as for the option.
PICTURES = 10_000
# Activity of a run between two evaluations.
TRAINING_ACTIVITY = "training"
# Time between two writes of ``run.json`` while a run trains.
HEARTBEAT_SECONDS = 15.0

# Far above what training in 32 bits gives, and the square is a float still.
Number = Annotated[float, Field(ge=-1e150, le=1e150)]
Count = Annotated[int, Field(ge=0, le=2**53)]
# A limit also refuses halves of UTF-16 pairs, which JSON can say and nothing can print.
Text = Annotated[str, Field(max_length=100_000)]


def validation_folder(run_folder: Path, step: int) -> Path:
    """The folder of the images or answers of a validation."""
    return run_folder / VALIDATION / f"step-{step}"


def image_file_name(number: int) -> str:
    """Name of the file of a validation's image, by its number in their order."""
    return f"{number:03d}.png"


def discard_later_steps(root: Path, last_step: int) -> None:
    """Delete the folders "step-N" of steps after ``last_step``, the newest first."""
    later_folders = {}
    for folder in root.glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and int(number) > last_step:
            later_folders[int(number)] = folder
    for step in sorted(later_folders, reverse=True):
        discard(later_folders[step])


class _Strict(BaseModel):
    """Base class: values are not converted, and keys of other versions are kept."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Options(_Strict):
    """Options of a run that evaluation and viewer read; each script has only some of them."""

    concepts: list[Options] = []
    concept: Text | None = None
    dataset_name: Text | None = None
    dataset_config_name: Text | None = None
    instance_data_dir: Text | None = None
    image_column: Text | None = None
    pretrained_model_name_or_path: Text | None = None
    pretrained_vae_model_name_or_path: Text | None = None
    model_name_or_path: Text | None = None
    revision: Text | None = None
    variant: Text | None = None
    cache_dir: Text | None = None
    tokenizer_name: Text | None = None
    task_type: Text | None = None
    attn_implementation: Text | None = None
    trust_remote_code: bool | None = None
    quantize: Text | None = None
    template: Text | None = None
    task: Text | None = None
    train_file: Text | None = None
    validation_prompts: list[Text] | None = None
    max_eval_samples: Count | None = None
    num_validation_images: Annotated[int, Field(ge=0, le=PICTURES)] | None = None
    resolution: Annotated[int, Field(ge=1, le=2**16)] | None = None
    max_train_steps: Count | None = None
    train_text_encoder: bool | None = None
    output_kohya_format: bool | None = None
    learning_rate: Number | None = None
    auxiliary_learning_rate: Number | None = None
    rank: Count | None = None
    auxiliary_rank: Count | None = None
    rho: Number | Text | None = None  # a word in runs of an earlier version
    rho_norm: Text | None = None


class Results(_Strict):
    """Outcome of a finished run; ``best_step`` is the step of its weights with --keep_best."""

    best_step: Count | None = None


class Record(_Strict):
    """``run.json``."""

    method: Annotated[str, Field(max_length=100)]
    status: Literal["running", "finished", "interrupted", "failed"]
    config: Options
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_steps: Count | None = None
    versions: dict[Text, Text | None] = {}
    commit: Text | None = None
    uncommitted_changes: bool | None = None
    device: dict[Text, Text | Number | None] = {}
    started_at: Text | None = None
    resumed: list[Any] = []
    wall_seconds: Annotated[Number, Field(ge=0)] = 0.0
    peak_memory_bytes: Count = 0
    removed_checkpoints: list[Count] = []
    doing: Text | None = None
    doing_since: Text | None = None
    error: Text | None = None
    results: Results = Results()


class Line(_Strict):
    """A line of ``metrics.jsonl``: numbers at a step, null where one was not finite."""

    __pydantic_extra__: dict[str, Number | bool | None]
    step: Count
    digest: Text | None = None
    dynamics: dict[str, Any] | None = None


@contextlib.contextmanager
def _explain_record_errors(place: object, fix: str, problem: str = "is damaged") -> Iterator[None]:
    """Make a sentence of what is raised within the context; a missing file stays an `OSError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        is_forbidden = isinstance(error, PermissionError)
        remedy = "check its rights" if is_forbidden else fix
        raise UserError(f"{place} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{place} {problem}{fault(error)}: {fix}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run folder, which fits `Record`.

    Raises:
        UserError: there is none, it is damaged, or its schema version is unknown.
    """
    path = Path(folder) / RUN
    try:
        with _explain_record_errors(path, "restore it from a copy, or give another run folder"):
            record = _parse_json(regular_file(path).read_bytes())
            version = record["schema_version"]
            # Of another version the types may differ, so only the number is read.
            if version == SCHEMA_VERSION:
                Record.model_validate(record)
                return record
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is not a run folder (it has no {RUN}): give another") from error
    raise UserError(
        f"{path} has schema version {reprlib.repr(version)}, but this version of bilora_diffusion"
        f" reads {SCHEMA_VERSION}: read it with the version that wrote it"
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` in order, without an incomplete last one; none without the file.

    Raises:
        UserError: another line does not fit `Line`.
    """
    path = Path(folder) / METRICS
    rows: list[dict[str, Any]] = []
    fix = "restore it from a copy, or start a new run in another folder"
    try:
        with _explain_record_errors(path, fix):
            lines = regular_file(path).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends with a newline
        with _explain_record_errors(f"line {number} of {path}", fix, "is not a metrics line"):
            row = _parse_json(line)
            Line.model_validate(row)
            rows.append(row)
    return rows


def last_measured(folder: Path, step: float = math.inf) -> dict[str, tuple[int, float | None]]:
    """The newest value of each held-out loss and metric up to a step, without single noise levels.

    Returns:
        Step and value by the name in the log.
    """
    newest: dict[str, tuple[int, float | None]] = {}
    for row in read_metrics(folder):
        # A run may have continued after the step whose weights it exports.
        if row["step"] > step:
            continue
        for key, value in row.items():
            # A slash comes before a noise level.
            is_heldout = re.fullmatch(r"heldout_[^/]*", key) is not None
            if is_heldout or key.startswith((TRAINING_GRID_LOSS, BY_CONCEPT)):
                newest[key] = (row["step"], value)
    return newest


def _parse_json(data: bytes) -> Any:
    """JSON in UTF-8, with NaN as null; infinities, which no run writes, are refused."""

    # json calls it for NaN and infinities, and takes what it returns.
    def constant(name: str) -> None:
        if name != "NaN":
            raise ValueError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), parse_constant=constant)


def fault(error: Exception) -> str:
    """The first value that does not fit its type, in brackets; "" for another error."""
    if not isinstance(error, ValidationError):
        return ""
    first = error.errors(include_url=False, include_context=False)[0]
    place = first["loc"]
    # An option or a result is named with what holds it, such as config.rank.
    depth = 2 if place[:1] in (("config",), ("results",)) else 1
    name = ".".join(map(str, place[:depth]))
    if not name:
        return ""
    if first["type"] == "missing":
        return f" (it has no {name})"
    return f" ({reprlib.repr(name)} is {reprlib.repr(first['input'])})"
