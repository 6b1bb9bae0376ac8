"""The embedded miniatures: a small, genuine ``StableDiffusionXLPipeline``, a
``StableDiffusion3Pipeline`` made from it, and the icons that go with them.

Only paths live here, so that importing this package costs nothing. ``README.md`` beside this file
is the model card.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UserError

MINI = "mini"
"""Its name as a model and as a data set."""
FLOW = "mini-flow"
"""The name of the flow-matching one."""
ANIMALS = "mini-animals"
"""A second set of icons, so small that adapters soon learn them by heart."""
COLORED = {f"{MINI}-duotone": "duotone", f"{MINI}-gray": "gray", f"{MINI}-pastel": "pastel"}
"""The icons in other colours: a set's name and its map in ``colors.MAPS``."""
HELDOUT_SUFFIX = "-heldout"
"""Ends the name of a set's held-out partner."""
_FOLDER = Path(__file__).resolve().parent
_FLOW = _FOLDER / "flow"


def pipeline_dir() -> Path:
    """Folder of the pipeline in diffusers format (float16), for
    ``StableDiffusionXLPipeline.from_pretrained``.
    """
    return _FOLDER / "pipeline"


def flow_dir() -> Path:
    """Folder of the flow-matching pipeline (float16), for
    ``StableDiffusion3Pipeline.from_pretrained``.

    Raises:
        UserError: the package was installed from a wheel, which is to be small.
    """
    if not _FLOW.is_dir():
        raise UserError(f"{FLOW} is in the repository only, not in its wheel: train from there.")
    return _FLOW


PIPELINES = {MINI: pipeline_dir, FLOW: flow_dir}


def embedded(model: str | Path) -> str | None:
    """The one of ``PIPELINES`` that a name or a folder stands for."""
    places = {pipeline_dir(): MINI, _FLOW: FLOW}
    return str(model) if model in PIPELINES else places.get(Path(model).expanduser().resolve())


def train_dir() -> Path:
    """Folder of the 23 DreamBooth icons (64 x 64 RGB PNG) and their ``metadata.jsonl``."""
    return _FOLDER / "train"


def heldout_dir() -> Path:
    """Folder of the 128 held-out icons and their ``metadata.jsonl``; the six subjects of Table 4
    come first.
    """
    return _FOLDER / "heldout"


def heldout_name(name: str) -> str:
    """What stands for the held-out icons of a set, such as "mini-heldout" of "mini"."""
    return f"{name}{HELDOUT_SUFFIX}"


def color_map(name: str) -> str | None:
    """The map of `colors.MAPS` through which a set's pictures are seen, or None."""
    return COLORED.get(name.removesuffix(HELDOUT_SUFFIX))


FOLDERS = {
    MINI: train_dir(),
    heldout_name(MINI): heldout_dir(),
    ANIMALS: _FOLDER / "animals" / "train",
    heldout_name(ANIMALS): _FOLDER / "animals" / "heldout",
    **dict.fromkeys(COLORED, train_dir()),
    **{heldout_name(name): heldout_dir() for name in COLORED},
}
"""Folders of icons by what stands for them where a set is named; 12 animals of Noto Emoji to learn
from, and 64 held-out ones, are in the form of the others. Those of `color_map` are opened in its
colours.
"""
