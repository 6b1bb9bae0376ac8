"""The way of a finished run to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..errors import UserError

# Of exports, diffusers would load one by its name where no file is named.
NOT_UPLOADED = ["checkpoints/*", "dynamics/*", "exports/*", "folds/*", "logs/*", ".*"]


def repository(cfg: Any) -> str:
    """The hub repository of this run; made now, so that a bad token is known before training.

    Raises:
        UserError: the hub refuses or cannot be reached.
    """
    name = cfg.hub_model_id or Path(cfg.output_dir).name
    try:
        return create_repo(repo_id=name, exist_ok=True, token=cfg.hub_token).repo_id
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push_to_hub cannot make the repository '{name}' ({reason}): log in with"
            " `hf auth login`, give --hub_model_id, or drop --push_to_hub."
        ) from error


def push(folder: Path, repo_id: str, token: str | None) -> None:
    """Upload the run folder without its checkpoints.

    Raises:
        UserError: the upload fails; the run folder is whole.
    """
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=NOT_UPLOADED,
            token=token,
        )
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"training is done and {folder} is whole, but the upload to '{repo_id}' failed"
            f" ({reason}): upload it with `hf upload {repo_id} {folder}`."
        ) from error
