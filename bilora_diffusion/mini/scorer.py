"""The miniature's scorer: a small CLIP, built from open_clip's classes, for the miniature's images.

The scorer measures the similarity of images and texts, and captions images by retrieval from a bank
of captions. ``scorer/README.md`` is its model card. Its scores are reported under its ``NAME`` and
can't be compared with the paper's scores, which come from other models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import Tensor, nn

from bilora_diffusion.core.errors import UserError

NAME = "mini-CLIP"
CAPTIONS_FILE = "captions.txt"
_FOLDER = Path(__file__).resolve().parent


def scorer_dir() -> Path:
    """Return the folder of the embedded scorer, for open_clip's ``local-dir:``."""
    return _FOLDER / "scorer"


def load(
    folder: Path | None = None,
) -> tuple[nn.Module, Callable[[Image.Image], Tensor], Callable[[Sequence[str]], Tensor]]:
    """Load a scorer with open_clip.

    Args:
        folder: folder with the same files as `scorer_dir`; None for `scorer_dir` itself.

    Returns:
        model: ``open_clip.model.CLIP``, float32, on the CPU, in eval mode.
        preprocess: PIL image -> (3, 64, 64) float32.
        tokenize: n strings -> (n, 32) int64; longer strings are truncated.

    Raises:
        UserError: open_clip or a file of the folder is missing.
    """
    folder = folder or scorer_dir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: restore it, since {NAME} needs it")
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"the scorer {NAME} needs open_clip, which is not installed: run"
            " `pip install open_clip_torch`"
        ) from error
    source = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    tokenize = open_clip.get_tokenizer(source)
    return model.eval(), cast(Any, preprocess), cast(Any, tokenize)


def captions(folder: Path | None = None) -> list[str]:
    """Read the bank of captions: a 3D caption of every label, then a flat caption of every label.

    Args:
        folder: as in `load`.

    Returns:
        3,140 captions, such as "a ToK icon of a rabbit, in the style of ToK".

    Raises:
        UserError: the file is missing.
    """
    path = (folder or scorer_dir()) / CAPTIONS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: restore it, since it is the caption bank of {NAME}")
    return path.read_text(encoding="utf-8").splitlines()
