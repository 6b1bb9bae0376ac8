"""What only the DreamBooth script refuses: its images, prompts and folders."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .checks import said
from .locations import check_locations
from .resolve import BUILT_IN


def check_inputs(values: dict[str, Any], given: frozenset[str]) -> None:
    """Refuse image sources and prompts that don't make a training set.

    Raises:
        UserError: one sentence with the value and the fix.
    """
    side = values["resolution"]
    if side is not None and (side < 8 or side % 8):
        near = max(8, round(side / 8) * 8)
        raise UserError(f"--resolution is {side}: give a multiple of 8, such as {near}.")
    _check_sources(values)
    if values["with_prior_preservation"]:
        _check_prior(values)


def _check_sources(values: dict[str, Any]) -> None:
    name, folder = values["dataset_name"], values["instance_data_dir"]
    if not name and not folder:
        raise UserError(
            "no images are given: add --dataset with a hub id, a folder or mini, or"
            " --instance_data_dir with a folder."
        )
    if name and folder:
        raise UserError(f'--dataset "{name}" and --instance_data_dir "{folder}": give only one.')
    if values["dataset_config_name"] and (folder or name in BUILT_IN):
        raise UserError(
            f"{said('dataset_config_name', values)} has no effect on {folder or name}: drop it."
        )
    if values["caption_column"] is None and not values["instance_prompt"]:
        raise UserError(
            f'"{name or folder}" has no prompt: add --instance_prompt, for example "a photo of TOK'
            ' dog", or --caption_column.'
        )
    if values["caption_column"] is not None and values["caption_column"] == values["image_column"]:
        raise UserError(
            f'"{values["image_column"]}" is both --image_column and --caption_column: change one.'
        )


def _check_prior(values: dict[str, Any]) -> None:
    for needed, example in (("class_data_dir", "class_images"), ("class_prompt", '"a dog"')):
        if not values[needed]:
            raise UserError(
                f"--with_prior_preservation needs --{needed}: add it, for example"
                f" --{needed} {example}."
            )


def check_results(values: dict[str, Any], given: frozenset[str]) -> None:
    """Refuse validation options without effect, and folders and ids that can't exist.

    Raises:
        UserError: one sentence with the value and the fix.
    """
    silent = not values["validation_prompts"] and values["num_validation_images"] > 0
    for name in ("num_validation_images", "validation_epochs"):
        if name in given and silent:
            raise UserError(
                f"{said(name, values)} has no effect without a prompt: add --validation_prompt or"
                " drop it."
            )
    if values["validation_loss_steps"] and not values["validation_dataset"]:
        raise UserError(
            f"{said('validation_loss_steps', values)} has no effect without held-out images: add"
            " --validation_dataset or drop it."
        )
    check_locations(values)
