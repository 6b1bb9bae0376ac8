"""Whether the folders and hub ids that the options name can exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config.resolve import BUILT_IN, pipeline_folder
from ..errors import UserError


def check_locations(values: dict[str, Any]) -> None:
    """Refuse folders that are not there, are empty or hold something else, and malformed ids.

    Raises:
        UserError: it names the option, its value and the fix.
    """
    _check_model(values)
    vae = values["pretrained_vae_model_name_or_path"]
    if vae is not None:
        _check_folder_or_id("pretrained_vae_model_name_or_path", vae)
    for name in ("dataset_name", "validation_dataset"):
        if values[name] is not None and values[name] not in BUILT_IN:
            _check_folder_or_id(name, values[name])
    if values["instance_data_dir"] is not None:
        _check_filled("instance_data_dir", values["instance_data_dir"])
    if values["class_data_dir"] is not None:
        _check_class_folder(values)
    if values["hub_model_id"] is not None:
        _check_id("hub_model_id", values["hub_model_id"])


def _check_model(values: dict[str, Any]) -> None:
    flag, model = "pretrained_model_name_or_path", values["pretrained_model_name_or_path"]
    folder = pipeline_folder(model)
    if folder is None:
        _check_folder_or_id(flag, model)
        return
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = {}
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    missing = [part for part in parts if part not in index or not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f'--{flag} "{model}" is no Stable Diffusion XL pipeline in diffusers format (it has no'
            f" {missing[0]}): give one, for example mini."
        )
    variant = values["variant"]
    if variant is not None and not any((folder / "unet").glob(f"*.{variant}*.safetensors")):
        raise UserError(f'--variant "{variant}" is not among the files of "{model}": drop it.')


def _check_folder_or_id(flag: str, value: str) -> None:
    path = Path(value).expanduser()
    if path.is_dir():
        _check_filled(flag, value)
    elif path.exists():
        raise UserError(f'--{flag} "{value}" is a file: give a folder or a hub id.')
    elif value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1:
        raise UserError(f'--{flag} "{value}" does not exist: correct the path, or give a hub id.')
    else:
        _check_id(flag, value)


def _check_id(flag: str, value: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise UserError(
            f'--{flag} "{value}" is neither a folder here nor a possible hub id: correct it.'
        ) from error


def _check_filled(flag: str, value: str) -> None:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f'--{flag} "{value}" does not exist: correct the path.')
    if not path.is_dir():
        raise UserError(f'--{flag} "{value}" is a file: give the folder that holds it.')
    try:
        empty = not any(path.iterdir())
    except OSError as error:
        raise UserError(f'--{flag} "{value}" may not be read: change its permissions.') from error
    if empty:
        raise UserError(f'--{flag} "{value}" is an empty folder: put images into it.')


def _check_class_folder(values: dict[str, Any]) -> None:
    value = values["class_data_dir"]
    path = Path(value).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f'--class_data_dir "{value}" is a file: give a folder.')
    for other in ("instance_data_dir", "dataset_name"):
        if values[other] and path.resolve() == Path(values[other]).expanduser().resolve():
            raise UserError(
                f'--class_data_dir "{value}" is the folder of the training images: give the class'
                " images a folder of their own."
            )
