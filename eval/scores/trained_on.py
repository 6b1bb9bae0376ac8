"""The images that each adapter was trained on, for memorization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.sources import ImageSet, open_images
from bilora_diffusion.run import runlog

from .adapters import Adapter

NONE = "none"


def open_sets(columns: Sequence[Adapter], given: str | None) -> dict[int, ImageSet]:
    """The training images by the adapters' positions.

    A run's folder says what it was trained on; a LoRA file does not. The base model is held
    against the images of the runs, where these are the same for all: it has not seen them, and so
    shows how alike images are without any memory.

    Args:
        given: ``--train_data``: a folder or set for all adapters, "none" for no memorization, or
            None.

    Raises:
        UserError: a set can't be opened.
    """
    if given == NONE:
        return {}
    if given is not None:
        return dict.fromkeys(range(len(columns)), open_images(given))
    opened: dict[tuple[str, str | None, str], ImageSet] = {}
    found: dict[int, ImageSet] = {}
    for position, entry in enumerate(columns):
        if entry.kind == "run" and entry.weights is not None:
            key = _recorded(entry.weights if entry.weights.is_dir() else entry.weights.parent)
            if key not in opened:
                opened[key] = _open(entry, *key)
            found[position] = opened[key]
    if len(opened) == 1:
        shared = next(iter(opened.values()))
        found |= {i: shared for i, entry in enumerate(columns) if entry.kind == "base"}
    return found


def _recorded(folder: Path) -> tuple[str, str | None, str]:
    """Name, configuration and image column of the set in a run's record."""
    config = runlog.read_run(folder)["config"]
    name = config.get("dataset_name") or config.get("instance_data_dir")
    if not name:
        raise UserError(
            f"{folder} does not say what it was trained on: give --train_data, or --train_data"
            f" {NONE} to leave memorization out."
        )
    return name, config.get("dataset_config_name"), config.get("image_column") or "image"


def _open(entry: Adapter, name: str, config_name: str | None, column: str) -> ImageSet:
    try:
        return open_images(name, image_column=column, config_name=config_name, skip_bad_images=True)
    except UserError as error:
        raise UserError(
            f"the training images of {entry.label} can't be opened ({str(error).rstrip('.')}): give"
            f" their folder as --train_data, or --train_data {NONE} to leave memorization out."
        ) from error
