"""The model card of a finished run, and its way to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..adapters import CHANGE_BASE
from ..errors import UserError
from ..lora_names import kohya_file_name
from ..methods import MethodOptions, get
from .card import write_card

# Of exports, diffusers would load one by its name where no file is named.
NOT_UPLOADED = ["checkpoints/*", "dynamics/*", "exports/*", "logs/*", ".*"]


def card(
    cfg: Any, folder: Path, images: Sequence[Path], repo_id: str | None, results: dict[str, Any]
) -> Path:
    """Write the run folder's ``README.md`` from what the run knows."""
    full = get(cfg.method).exports_weights
    prompts = cfg.sampled_prompts
    known = len(prompts) == len(images)  # else they are of an earlier setting of a resumed run
    shown = {"held-out loss": "heldout_loss", "loss on the training images": "train_grid_loss"}
    return write_card(
        folder,
        base_model=cfg.pretrained_model_name_or_path,
        method=cfg.method,
        dataset=cfg.dataset_name or cfg.instance_data_dir,
        prompts=prompts if known else (),
        images=images if known else (),
        instance_prompt=cfg.instance_prompt,
        settings=run_settings(cfg, results["steps"]),
        results={title: results[key] for title, key in shown.items() if key in results},
        vae=cfg.pretrained_vae_model_name_or_path,
        repo_id=repo_id,
        kohya_name=kohya_file_name(folder) if cfg.output_kohya_format else None,
        dora=cfg.use_dora,
        whole_models=results["export"] if full else (),
    )


def run_settings(cfg: Any, steps: int) -> dict[str, Any]:
    """What a model card says of how the run was made; None where there is nothing to say."""
    adapter = {
        "rank": cfg.rank,
        "alpha": cfg.lora_alpha,
        "init": None if cfg.init_lora_weights == "default" else cfg.init_lora_weights,
        "rank of the file": 2 * cfg.rank if cfg.init_lora_weights in CHANGE_BASE else None,
        "DoRA": "yes" if cfg.use_dora else None,
        "quantized base": None if cfg.quantize == "none" else cfg.quantize,
    }
    return {
        "method": cfg.method,
        **({} if get(cfg.method).exports_weights else adapter),
        "learning rate": cfg.learning_rate,
        "optimizer steps": steps,
        "seed": cfg.seed,
        **method_settings(cfg),
        **({"weight averaging, decay": cfg.ema_decay} if cfg.use_ema else {}),
    }


def method_settings(cfg: Any) -> dict[str, Any]:
    """What was set of the method's own options: its radius, and what is not as usual."""
    usual, own = MethodOptions(), {}
    for name in sorted(get(cfg.method).reads):
        value = getattr(cfg, name)
        if name == "rho" or value != getattr(usual, name):
            own[name.replace("_", " ")] = value
    if "auxiliary_rank" in get(cfg.method).reads:
        own["auxiliary rank"] = cfg.auxiliary_rank or cfg.rank
    return own


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
