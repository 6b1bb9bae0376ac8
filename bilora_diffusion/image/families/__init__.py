"""The families of image models that can be trained, by the name of their pipeline class.

The code of a family is one row here and one file in this folder. CONTRIBUTING.md lists the tests,
recipes and pages that need an entry for a new family. A family's file is imported only when the
family is used, since options are checked before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...core.errors import UserError, did_you_mean

SDXL = "StableDiffusionXLPipeline"
# Pipeline class -> the family's file, and the family's class in that file.
FAMILIES: dict[str, tuple[str, str]] = {
    SDXL: ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "Flux2KleinPipeline": ("flux2", "Flux2Klein"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "Krea2Pipeline": ("krea2", "Krea2"),
    "Lumina2Pipeline": ("lumina2", "Lumina2"),
}


def family_class(pipeline: str, model: str) -> Any:
    """Return the family class of a pipeline, a subclass of ``base.Family``.

    Args:
        pipeline: name of the pipeline class.
        model: name of the model, for the error message.

    Raises:
        UserError: no family has this pipeline class.
    """
    if pipeline not in FAMILIES:
        raise UserError(
            f'"{model}" is a {pipeline}{did_you_mean(pipeline, FAMILIES)}, which can\'t be trained'
            f" here: give a model whose pipeline is one of {', '.join(FAMILIES)}."
        )
    module, kind = FAMILIES[pipeline]
    return getattr(import_module(f"{__name__}.{module}"), kind)


def family_of(pipeline: Any) -> Any:
    """Return the family of a loaded pipeline, a ``base.Family`` with its default settings."""
    name = type(pipeline).__name__
    return family_class(name, getattr(pipeline, "name_or_path", name))()
