"""The way of a finished run to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, create_commit, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects

from ..core.durable import dump_json
from ..core.errors import UserError, reason
from ..core.files import without_paths

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
