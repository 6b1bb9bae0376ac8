"""The embedded miniatures: a small SDXL pipeline, an SD3 pipeline with its autoencoder, and icons.

This module has only names and paths, so importing it is cheap. ``README.md`` in this folder is the
model card.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UserError

MINI = "mini"  # the SDXL model, and the set of images in the 3D style
FLOW = "mini-flow"  # the flow-matching model
ANIMALS = "mini-animals"  # a second set of images, so small that adapters soon memorize it
# Sets in other colors, by name: the original set and the color map's name in `colors.MAPS`.
COLORED = {
    f"{MINI}-duotone": (MINI, "duotone"),
    f"{MINI}-gray": (MINI, "gray"),
    f"{MINI}-pastel": (MINI, "pastel"),
    f"{ANIMALS}-duotone": (ANIMALS, "duotone"),  # for images of two LoRA files
}
HELDOUT_SUFFIX = "-heldout"  # suffix of the names of held-out sets
_FOLDER = Path(__file__).resolve().parent
_FLOW = _FOLDER / "flow"


def pipeline_dir() -> Path:
    """Return the float16 pipeline's folder, for ``StableDiffusionXLPipeline.from_pretrained``."""
    return _FOLDER / "pipeline"


def flow_dir() -> Path:
    """Return the folder of the flow-matching pipeline, a `StableDiffusion3Pipeline` without T5.

    Raises:
        UserError: the package was installed from a wheel, which does not contain this folder.
    """
    if not _FLOW.is_dir():
        raise UserError(
            f"{FLOW} is only in the repository, not in the wheel: train in a clone of the"
            " repository."
        )
    return _FLOW


def four_steps_file() -> Path:
    """Return the LoRA file that lets the pipeline sample in four steps without guidance.

    The file is for Euler's scheduler with ``timestep_spacing`` "trailing"; see ``README.md``. A
    wheel does not contain it.
    """
    return _FOLDER / "four_steps.safetensors"


PIPELINES = {MINI: pipeline_dir, FLOW: flow_dir}


def find_embedded(model: str | Path) -> str | None:
    """Return the name in ``PIPELINES`` of a model that is given by name or folder, or None."""
    if model in PIPELINES:
        return str(model)
    names = {pipeline_dir(): MINI, _FLOW: FLOW}
    return names.get(Path(model).expanduser().resolve())


def train_dir() -> Path:
    """Return the folder of the 23 training icons (64 x 64 RGB PNG) and ``metadata.jsonl``."""
    return _FOLDER / "train"


def heldout_dir() -> Path:
    """Return the folder of the 128 held-out icons and ``metadata.jsonl``.

    The first six show the subjects of the paper's Table 4.
    """
    return _FOLDER / "heldout"


def heldout_name(name: str) -> str:
    """Return the name of a set's held-out icons, such as "mini-heldout" for "mini"."""
    return f"{name}{HELDOUT_SUFFIX}"


def color_map(name: str) -> str | None:
    """Return the name in `colors.MAPS` of a set's color map, or None for original colors."""
    _, colors = COLORED.get(name.removesuffix(HELDOUT_SUFFIX), (None, None))
    return colors


# Folders of icons by set name. The animals, 12 for training and 64 held out, are from Noto Emoji;
# their format is the same as that of the other icons. A set with a `color_map` uses the folder of
# its original set, and its colors are mapped when it is opened.
FOLDERS = {
    MINI: train_dir(),
    heldout_name(MINI): heldout_dir(),
    ANIMALS: _FOLDER / "animals" / "train",
    heldout_name(ANIMALS): _FOLDER / "animals" / "heldout",
}
for _name, (_original, _) in COLORED.items():
    FOLDERS[_name] = FOLDERS[_original]
    FOLDERS[heldout_name(_name)] = FOLDERS[heldout_name(_original)]
