"""Types and readers of a run's files ``run.json`` and ``metrics.jsonl``.

All code that reads a run (resume, guard, evaluation, viewer) uses these readers and relies on these
types. A value of another type makes the run unreadable; the message names the value.
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
# Picture of training images, 24 at most, cropped as in training and with their captions.
CONTACT_SHEET = "training_images.png"
# Prefix of the log names of the held-out losses of single concepts; the concept's name follows.
BY_CONCEPT = "heldout_loss_by_concept/"
# Maximum number of validation images per prompt, as for the option.
PICTURES = 10_000
# Name of a run's activity between two evaluations.
TRAINING_ACTIVITY = "training"
# Minimum number of seconds between two writes of ``run.json`` by `RunLog.metric`.
HEARTBEAT_SECONDS = 15.0

# The limit is far above any fp32 number, and its square is still a finite float.
Number = Annotated[float, Field(ge=-1e150, le=1e150)]
Count = Annotated[int, Field(ge=0, le=2**53)]
# With a maximum length, pydantic also refuses lone surrogates, which JSON may contain but which
# can't be printed.
Text = Annotated[str, Field(max_length=100_000)]


def validation_folder(run_folder: Path, step: int) -> Path:
    """Return the folder of a validation's images or answers."""
    return run_folder / VALIDATION / f"step-{step}"


def image_file_name(number: int) -> str:
    """Return the file name of the validation image with this number."""
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
    """Base class that does not convert values, and that keeps unknown keys of other versions."""

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
    """Content of ``run.json``."""

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
    """A line of ``metrics.jsonl``: numbers at a step; null for a number that was not finite."""

    __pydantic_extra__: dict[str, Number | bool | None]
    step: Count
    digest: Text | None = None
    dynamics: dict[str, Any] | None = None


@contextlib.contextmanager
def _explain_record_errors(place: object, fix: str, problem: str = "is damaged") -> Iterator[None]:
    """Convert errors inside the context to UserError, except for the OSError of a missing file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        is_forbidden = isinstance(error, PermissionError)
        remedy = "check its permissions" if is_forbidden else fix
        raise UserError(f"{place} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{place} {problem}{fault(error)}: {fix}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's ``run.json``, which has the types of `Record`.

    Raises:
        UserError: there is no such file, it can't be read, it is damaged, or its schema version is
            unknown.
    """
    path = Path(folder) / RUN
    try:
        with _explain_record_errors(path, "restore it from a copy, or give another run folder"):
            record = _parse_json(regular_file(path).read_bytes())
            version = record["schema_version"]
            # The types of another version may differ, so only its number is read.
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
    """Return the complete lines of ``metrics.jsonl`` in order; [] if there is no such file.

    Raises:
        UserError: the file can't be read, or a complete line does not have the types of `Line`.
    """
    path = Path(folder) / METRICS
    rows: list[dict[str, Any]] = []
    fix = "restore it from a copy, or start a new run in another folder"
    try:
        with _explain_record_errors(path, fix):
            lines = regular_file(path).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    for number, line in enumerate(lines[:-1], start=1):  # a complete line ends with a newline
        with _explain_record_errors(f"line {number} of {path}", fix, "is not a metrics line"):
            row = _parse_json(line)
            Line.model_validate(row)
            rows.append(row)
    return rows


def last_measured(folder: Path, step: float = math.inf) -> dict[str, tuple[int, float | None]]:
    """Return the newest values of the held-out measures up to a step.

    The losses of single concepts and the held-out loss's counterpart on training samples are
    included; the losses at single noise levels and the distances of single images are not.

    Returns:
        Step and value, by log name.
    """
    newest: dict[str, tuple[int, float | None]] = {}
    for row in read_metrics(folder):
        # A run may have continued after the step whose weights it exports.
        if row["step"] > step:
            continue
        for key, value in row.items():
            # The name of a value at a single noise level or of a single image contains a slash.
            is_heldout = re.fullmatch(r"heldout_[^/]*", key) is not None
            if is_heldout or key.startswith((TRAINING_GRID_LOSS, BY_CONCEPT)):
                newest[key] = (row["step"], value)
    return newest


def _parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8; read NaN as null, and refuse infinities, which no run writes."""

    # json calls this function for NaN and infinities, and uses its result.
    def constant(name: str) -> None:
        if name != "NaN":
            raise ValueError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), parse_constant=constant)


def fault(error: Exception) -> str:
    """Return the first value with a wrong type, in parentheses; "" for another error."""
    if not isinstance(error, ValidationError):
        return ""
    first = error.errors(include_url=False, include_context=False)[0]
    place = first["loc"]
    # An option or a result is named with its section, such as config.rank.
    depth = 2 if place[:1] in (("config",), ("results",)) else 1
    name = ".".join(map(str, place[:depth]))
    if not name:
        return ""
    if first["type"] == "missing":
        return f" (it has no {name})"
    return f" ({reprlib.repr(name)} is {reprlib.repr(first['input'])})"
