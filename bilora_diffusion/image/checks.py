"""What only the DreamBooth script refuses: its images, prompts and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import is_folder


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
    bare = values["caption_column"] is None and not values["instance_prompt"]
    if bare and not _has_captions(name or folder):
        raise UserError(
            f'"{name or folder}" has no prompt: add --instance_prompt, for example "a photo of TOK'
            ' dog", --caption_column, or a .txt file with its caption beside each image.'
        )
    if values["caption_column"] is not None and values["caption_column"] == values["image_column"]:
        raise UserError(
            f'"{values["image_column"]}" is both --image_column and --caption_column: change one.'
        )


def _has_captions(place: str) -> bool:
    """Whether a folder has captions beside images; an image without is found when it is opened."""
    from .listing import look

    folder = Path(place).expanduser()
    return is_folder(folder) and look(folder).has_captions()


def _check_prior(values: dict[str, Any]) -> None:
    for needed, example in (("class_data_dir", "class_images"), ("class_prompt", '"a dog"')):
        if not values[needed]:
            raise UserError(
                f"--with_prior_preservation needs --{needed}: add it, for example"
                f" --{needed} {example}."
            )
