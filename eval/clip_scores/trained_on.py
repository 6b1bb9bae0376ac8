"""The images that each subject was trained on, for memorization."""

from __future__ import annotations

from collections.abc import Sequence

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet

from ..subjects import BASE, Subject

NONE = "none"


def open_sets(subjects: Sequence[Subject], given: str | None) -> dict[str, ImageSet]:
    """The training images by the subjects' labels.

    A run's folder says what it was trained on; a LoRA file does not. The base model is held
    against the images of the runs, where these are the same for all: it has not seen them, and so
    shows how alike images are without any memory.

    Args:
        given: ``--train_data``: a folder or set for all subjects, "none" for no memorization, or
            None.

    Raises:
        UserError: a set can't be opened.
    """
    if given == NONE:
        return {}
    if given is not None:
        return dict.fromkeys((subject.label for subject in subjects), open_images(given))
    opened: dict[tuple[str, ...], ImageSet] = {}
    sets: dict[str, ImageSet] = {}
    for subject in subjects:
        if subject.folder is not None:
            names = ("dataset_name", "instance_data_dir", "dataset_config_name", "image_column")
            key = tuple(str(subject.option(name)) for name in names)
            sets[subject.label] = opened[key] = opened.get(key) or _open(subject)
    if len(opened) == 1:
        (shared,) = opened.values()
        sets |= {subject.label: shared for subject in subjects if subject.kind == BASE}
    return sets


def _open(subject: Subject) -> ImageSet:
    name = subject.option("dataset_name") or subject.option("instance_data_dir")
    left_out = f"or --train_data {NONE} to leave memorization out."
    if not name:
        raise UserError(
            f"{subject.folder} does not say what it was trained on: give --train_data, {left_out}"
        )
    try:
        return open_images(
            name,
            image_column=subject.option("image_column") or "image",
            config_name=subject.option("dataset_config_name"),
            skip_bad_images=True,
        )
    except UserError as error:
        raise UserError(
            f"the training images of {subject.label} can't be opened ({str(error).rstrip('.')}):"
            f" give their folder as --train_data, {left_out}"
        ) from error
