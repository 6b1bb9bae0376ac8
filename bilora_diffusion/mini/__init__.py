"""The embedded miniatures: a small SDXL pipeline, an SD3 pipeline made from it, and their icons.

This file has only paths, so that importing the package is cheap. ``README.md`` in this folder
is the model card.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UserError

MINI = "mini"  # a model and a set of images
FLOW = "mini-flow"  # the flow-matching model
ANIMALS = "mini-animals"  # a second set, so small that adapters soon memorize it
# Sets in other colors: the set's name -> the original set, and the map in `colors.MAPS`.
COLORED = {
    f"{MINI}-duotone": (MINI, "duotone"),
    f"{MINI}-gray": (MINI, "gray"),
    f"{MINI}-pastel": (MINI, "pastel"),
    f"{ANIMALS}-duotone": (ANIMALS, "duotone"),  # a subject of one file in the style of another
}
HELDOUT_SUFFIX = "-heldout"  # suffix of the name of a set's held-out images
_FOLDER = Path(__file__).resolve().parent
_FLOW = _FOLDER / "flow"


def pipeline_dir() -> Path:
    """Folder of the pipeline, for ``StableDiffusionXLPipeline.from_pretrained``; in float16."""
    return _FOLDER / "pipeline"


def flow_dir() -> Path:
    """Folder of the flow-matching pipeline, for ``StableDiffusion3Pipeline.from_pretrained``.

    Raises:
        UserError: the package was installed from a wheel, which does not have this folder.
    """
    if not _FLOW.is_dir():
        raise UserError(f"{FLOW} is in the repository only, not in its wheel: train from there.")
    return _FLOW


def four_steps_file() -> Path:
    """LoRA file that distills the pipeline to four steps without guidance; see ``README.md``.

    It is for Euler's scheduler with ``timestep_spacing`` "trailing". A wheel does not have it.
    """
    return _FOLDER / "four_steps.safetensors"


PIPELINES = {MINI: pipeline_dir, FLOW: flow_dir}


def find_embedded(model: str | Path) -> str | None:
    """The name in ``PIPELINES`` of a model's name or folder, or None."""
    if model in PIPELINES:
        return str(model)
    names = {pipeline_dir(): MINI, _FLOW: FLOW}
    return names.get(Path(model).expanduser().resolve())


def train_dir() -> Path:
    """Folder of the 23 training icons (64 x 64 RGB PNG) and their ``metadata.jsonl``."""
    return _FOLDER / "train"


def heldout_dir() -> Path:
    """Folder of the 128 held-out icons and their ``metadata.jsonl``.

    The first six show the subjects of the paper's Table 4.
    """
    return _FOLDER / "heldout"


def heldout_name(name: str) -> str:
    """The name of a set's held-out icons, such as "mini-heldout" for "mini"."""
    return f"{name}{HELDOUT_SUFFIX}"


def color_map(name: str) -> str | None:
    """The name in `colors.MAPS` of a set's color map, or None for original colors."""
    _, colors = COLORED.get(name.removesuffix(HELDOUT_SUFFIX), (None, None))
    return colors


# Folders of icons by set name. The 12 animals of Noto Emoji and the 64 held-out animals have the
# same form as the others. Sets with a `color_map` are opened in its colors.
FOLDERS = {
    MINI: train_dir(),
    heldout_name(MINI): heldout_dir(),
    ANIMALS: _FOLDER / "animals" / "train",
    heldout_name(ANIMALS): _FOLDER / "animals" / "heldout",
}
for _name, (_original, _) in COLORED.items():
    FOLDERS[_name] = FOLDERS[_original]
    FOLDERS[heldout_name(_name)] = FOLDERS[heldout_name(_original)]
