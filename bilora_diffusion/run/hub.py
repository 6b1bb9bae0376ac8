"""A finished run for others: its model card, and its way to the Hugging Face Hub.

The card is ``README.md`` of the run folder, with the front matter of the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import (
    CommitOperationAdd,
    ModelCardData,
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
from ..mini import embedded
from .folder import FIT_FIGURE


def write_card(
    options: Mapping[str, Any],
    folder: Path,
    results: Mapping[str, Any],
    meta: ModelCardData,
    measured: Mapping[str, Any],
    **facts: Any,
) -> None:
    """Write ``folder/README.md`` from ``card.jinja``; only what is given is said.

    Args:
        options: of the run, by name.
        folder: the run folder.
        results: steps taken, and what else the record of the run has.
        meta: the front matter.
        measured: held-out figures by their titles.
        facts: what base model and data are called, without paths of this machine, and how the
            weights are loaded, under the names that the template has.
    """
    method = get(options["method"])
    outcome = {
        "step of these weights, with the lowest held-out loss": results.get("best_step"),
        "stopped early, after steps": results["steps"] if results.get("stopped_early") else None,
        "steps chosen by --fit": _chosen_steps(options, results),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": code, "escaped": escaped, "python": python_block, "repr": repr}
    text = environment.get_template("card.jinja").render(
        meta=meta,
        method=method,
        settings=_without_none(_settings(options, results["steps"])),
        results=_without_none({**measured, **outcome}),
        fit=FIT_FIGURE if options["fit"] else None,
        **facts,
    )
    write_text(folder / "README.md", re.sub("\n{3,}", "\n\n", text.strip()) + "\n")


def _chosen_steps(options: Mapping[str, Any], results: Mapping[str, Any]) -> str | int | None:
    """Steps that a fit chose, with those that it trained where its rate falls; None without one."""
    chosen, trained = results.get("chosen_steps"), options["max_train_steps"]
    if chosen in (None, trained):
        return chosen
    return f"{chosen} at a constant rate, trained as {trained} at a rate that falls to zero"


def _without_none(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rows.items() if value is not None}


def _settings(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Settings of the run; of the method's own options its radius, and what is not as usual."""
    method = get(options["method"])
    settings: dict[str, Any] = {"method": method.title}
    if not method.exports_weights:
        init = options["init_lora_weights"]
        settings["rank"] = options["rank"]
        settings["alpha"] = options["lora_alpha"]
        if init != "default":
            settings["init"] = init
        if init in CHANGE_BASE:
            # The file holds the difference of two adapters, side by side.
            settings["rank of the file"] = 2 * options["rank"]
        if options["use_dora"]:
            settings["DoRA"] = "yes"
        if options["quantize"] != "none":
            settings["quantized base"] = options["quantize"]
    settings["learning rate"] = options["learning_rate"]
    settings["optimizer steps"] = steps
    settings["seed"] = options["seed"]
    for name, usual in default_options(method).items():
        if name == "rho" or options[name] != usual:
            settings[name.replace("_", " ")] = options[name]
    if "auxiliary_rank" in method.reads:
        settings["auxiliary rank"] = options["auxiliary_rank"] or options["rank"]
    if options["use_ema"]:
        settings["weight averaging, decay"] = options["ema_decay"]
    return settings


def source(name: str) -> str:
    """A model's or data set's name as it may be published: not where it lies on this machine."""
    return embedded(name) or (name if is_hub_id(name) else Path(name).name)


def is_hub_id(name: str) -> bool:
    """Test that a name can be one on the hub and is no folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def loaded_from(name: str) -> str:
    """Argument of ``from_pretrained`` in a card: a hub id, or the place of the reader's folder."""
    return name if is_hub_id(name) else f"path/to/{name}"


def escaped(value: str | int | float) -> str:
    """One line of text that Markdown shows as it is."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """One line of text as inline code, whatever backticks it has."""
    line = " ".join(text.split())
    marks = _fence(line, 1)
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{marks}{pad}{line}{pad}{marks}"


def python_block(text: str) -> str:
    """Lines of Python as a block, whatever backticks they have."""
    marks = _fence(text, 3)
    return f"{marks}python\n{text.strip()}\n{marks}\n"


def _fence(text: str, min_length: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(min_length, longest + 1)


# Of exports, diffusers would load one by its name where no file is named.
NOT_UPLOADED = ["checkpoints/*", "dynamics/*", "exports/*", "fit/*", "logs/*", ".*"]
NAME_PATHS = ["run.json", "fit.json", "adapter_config.json", "config.json", "*/config.json"]
"""Files that say where base model, images and the run itself lie on this machine."""


def repository(name: str, token: str | None) -> str:
    """The hub repository of this run; made now, so that a bad token is known before training."""
    try:
        return create_repo(repo_id=name, exist_ok=True, token=token).repo_id
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--push_to_hub cannot make the repository '{name}' ({reason(error)}): log in with"
            " `hf auth login`, give --hub_model_id, or drop --push_to_hub."
        ) from error


def push(folder: Path, repo_id: str, token: str | None) -> None:
    """Upload the run folder without its checkpoints, and without what tells of this machine.

    Raises:
        UserError: the upload fails; the run folder is whole.
    """
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.json")]
    paths = filter_repo_objects(files, allow_patterns=NAME_PATHS, ignore_patterns=NOT_UPLOADED)
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=[*NOT_UPLOADED, *NAME_PATHS],
            token=token,
        )
        added = [CommitOperationAdd(name, published(folder / name).encode()) for name in paths]
        create_commit(repo_id, added, commit_message="Record and settings", token=token)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"training is done and {folder} is whole, but the upload to '{repo_id}' failed"
            f" ({reason(error)}): upload it with `hf upload {repo_id} {folder}`."
        ) from error


def published(file: Path) -> str:
    """A JSON file as it may be read by others: of paths of this machine only the last names."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        if not isinstance(value, str):
            return value
        # A folder's name may have spaces, at which a path in a sentence ends.
        return Path(value).name if Path(value).is_absolute() else without_paths(value)

    return dump_json(cut(json.loads(file.read_text(encoding="utf-8"))))
