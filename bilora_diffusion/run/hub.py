"""Publication of a finished run: its model card, and its upload to the Hugging Face Hub.

The card is the run folder's ``README.md``, with the hub's front matter.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import (
    CommitOperationAdd,
    ModelCardData,
    auth_check,
    create_commit,
    create_repo,
    upload_folder,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects

from ..adapters import CHANGE_BASE
from ..core.durable import dump_json, write_text
from ..core.errors import UserError, reason
from ..core.files import without_paths
from ..methods import get
from ..methods.registry import default_options
from ..mini import find_embedded
from .record import CONTACT_SHEET


def write_card(
    options: Mapping[str, Any],
    folder: Path,
    results: Mapping[str, Any],
    meta: ModelCardData,
    measured: Mapping[str, Any],
    **facts: Any,
) -> None:
    """Write ``folder/README.md`` from ``card.jinja``; rows and parts without a value are omitted.

    Args:
        options: options of the run, by name.
        folder: the run folder.
        results: results in the run's record, such as the number of steps taken.
        meta: the front matter.
        measured: measurements on held-out samples, by title.
        facts: other variables of the template, such as the names of the base model, the data and
            the files, without paths of this machine.
    """
    method = get(options["method"])
    outcome = {
        "step of these weights, the best one measured": results.get("best_step"),
        "stopped early, after steps": results["steps"] if results.get("stopped_early") else None,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "code": inline_code,
        "escape_markdown": escape_markdown,
        "python": python_block,
        "repr": repr,
    }
    text = environment.get_template("card.jinja").render(
        meta=meta,
        method=method,
        settings=_without_none(_settings(options, results["steps"])),
        results=_without_none({**measured, **outcome}),
        loras=options["lora_sources"],
        **facts,
    )
    # Omitted parts of the template leave empty lines.
    text = re.sub("\n{3,}", "\n\n", text.strip()) + "\n"
    write_text(folder / "README.md", text)


def _without_none(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rows.items() if value is not None}


def _settings(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the run's settings for the card.

    Of the options that the method reads, these are the radius, the auxiliary's rank, and those with
    other values than their defaults.
    """
    method = get(options["method"])
    settings: dict[str, Any] = {"method": method.title}
    if not method.exports_weights:
        init = options["init_lora_weights"]
        settings["rank"] = options["rank"]
        settings["alpha"] = options["lora_alpha"]
        if init != "default":
            settings["init"] = init
        if init in CHANGE_BASE:
            # The file has the difference of two adapters as one adapter with twice the rank.
            settings["rank of the file"] = 2 * options["rank"]
        if options["use_dora"]:
            settings["DoRA"] = "yes"
        if options["quantize"] != "none":
            settings["quantized base"] = options["quantize"]
    settings["learning rate"] = options["learning_rate"]
    settings["optimizer steps"] = steps
    settings["seed"] = options["seed"]
    for name, default in default_options(method).items():
        # A radius is always shown, since results are compared by it.
        if name == "rho" or options[name] != default:
            settings[name.replace("_", " ")] = options[name]
    if "auxiliary_rank" in method.reads:
        settings["auxiliary rank"] = options["auxiliary_rank"] or options["rank"]
    return settings


def public_name(name: str) -> str:
    """Return the name of a model or a data set for publication; a path is cut to its last part."""
    embedded_name = find_embedded(name)
    if embedded_name:
        return embedded_name
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id and is not a local path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def loaded_from(name: str) -> str:
    """Return the argument of ``from_pretrained`` in a card: a hub id, or a path to fill in."""
    return name if is_hub_id(name) else f"path/to/{name}"


def escape_markdown(value: str | int | float) -> str:
    """Put a text on one line and escape the characters that Markdown interprets."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", line)


def inline_code(text: str) -> str:
    """Return a text as inline code on one line; it may contain backticks."""
    line = " ".join(text.split())
    fence = _fence(line, 1)
    # Spaces separate a backtick at either end from the fence; Markdown removes them.
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def python_block(text: str) -> str:
    """Return lines of Python as a code block; they may contain backticks."""
    fence = _fence(text, 3)
    return f"{fence}python\n{text.strip()}\n{fence}\n"


def _fence(text: str, min_length: int) -> str:
    """Return a fence longer than any backticks in the text and at least ``min_length`` long."""
    length = min_length
    for backticks in re.findall("`+", text):
        length = max(length, len(backticks) + 1)
    return "`" * length


# Exports are left out, since diffusers would load one of them if no file is named. The contact
# sheet is left out, since it shows the training images, which may be private.
NOT_UPLOADED = ["checkpoints/*", "dynamics/*", "exports/*", "logs/*", CONTACT_SHEET, ".*"]
# Files that contain paths of this machine: to the base model, the images and the run itself.
WITH_PATHS = ["run.json", "adapter_config.json", "config.json", "*/config.json"]


def repository(name: str, token: str | None) -> str:
    """Create the run's hub repository before training, so that an invalid token is noticed early.

    Returns:
        The repository's id.

    Raises:
        UserError: the repository can't be created, or the token can't write to it.
    """
    try:
        repo_id = create_repo(repo_id=name, exist_ok=True, token=token).repo_id
        # `create_repo` accepts a token that can't write to an existing repository.
        auth_check(repo_id, token=token, write=True)
        return repo_id
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--push_to_hub cannot write to the repository '{name}' ({reason(error)}): log in with"
            " `hf auth login`, give --hub_model_id, or drop --push_to_hub."
        ) from error


def push(folder: Path, repo_id: str, token: str | None) -> None:
    """Upload the run folder without the files in `NOT_UPLOADED` and without paths of this machine.

    Raises:
        UserError: the upload failed; the run folder is complete.
    """
    # JSON files that contain paths are uploaded as edited copies, all other files unchanged.
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.json")]
    names = filter_repo_objects(files, allow_patterns=WITH_PATHS, ignore_patterns=NOT_UPLOADED)
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=NOT_UPLOADED + WITH_PATHS,
            token=token,
        )
        added = [CommitOperationAdd(name, redact_paths(folder / name).encode()) for name in names]
        create_commit(repo_id, added, commit_message="Record and settings", token=token)
    except (HfHubHTTPError, OSError) as error:
        words = ["hf", "upload", repo_id, str(folder)]
        for pattern in NOT_UPLOADED + WITH_PATHS:
            words += ["--exclude", pattern]
        raise UserError(
            f"training is done and {folder} is complete, but the upload to '{repo_id}' failed"
            f" ({reason(error)}): upload the files without paths of this machine with"
            f" `{shlex.join(words)}`."
        ) from error


def redact_paths(file: Path) -> str:
    """Return a JSON file's content for publication, without the names of this machine's folders."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        if not isinstance(value, str):
            return value
        # A value that is a path may contain spaces; in other texts a path ends at a space.
        if Path(value).is_absolute():
            return Path(value).name
        return without_paths(value)

    return dump_json(cut(json.loads(file.read_text(encoding="utf-8"))))
