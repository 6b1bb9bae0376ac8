"""Options of flow-matching models: SD3, FLUX and later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..fields import Idle, option
from ..values import Range
from .families import SDXL

ON_SDXL = Idle(
    lambda v: v["pipeline"] == SDXL,
    "on Stable Diffusion XL, which is not a flow model",
)
WITHOUT_GUIDANCE = Idle(
    lambda v: not v["told_guidance"], "on a model that has no embedding of guidance"
)


@dataclass(frozen=True)
class FlowOptions:
    """Options of flow-matching transformers: SD3, FLUX and later models."""

    section: ClassVar[str] = "flow-matching models"

    lora_layers: list[str] = option(  # noqa: RUF009
        [],
        "Layers of the denoiser that get adapters, of any image model: groups (attention,"
        " feed-forward, convolutions, all-linear, all) and the ends of layers' names (to_k,"
        " ff.net.2), with commas, plus signs or spaces between, such as attention+feed-forward."
        " Default: attention, its projections.",
        aliases=("--lora_target_modules",),
    )
    max_sequence_length: int | None = option(
        None,
        "Tokens of a prompt that are read. Default: as diffusers' script for the model (SD3 77,"
        " Lumina 2 256, others 512).",
        range=Range(4096, "no text encoder of these models reads more", at_least=1),
        idle=(ON_SDXL,),
    )
    guidance_scale: float | None = option(
        None,
        "Guidance that a distilled model with an embedding of it (FLUX.1-dev) is told in training."
        " Default: 3.5, as diffusers' script.",
        range=Range(100, "images are spoiled by far less", at_least=0),
        idle=(ON_SDXL, WITHOUT_GUIDANCE),
    )
    weighting_scheme: str | None = option(
        None,
        "How noise levels are drawn (logit_normal, mode) or weighed (sigma_sqrt, cosmap; arXiv"
        " 2403.03206, Section 3.1). Default: as diffusers' script for the model (SD3 logit_normal,"
        " others none).",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        idle=(ON_SDXL,),
    )
    logit_mean: float = option(
        0.0,
        "Mean of logit_normal.",
        range=Range(20, "all levels would be alike", at_least=-20),
        idle=(ON_SDXL,),
    )
    logit_std: float = option(
        1.0,
        "Standard deviation of logit_normal.",
        range=Range(100, "only the two ends would be drawn", above=0),
        idle=(ON_SDXL,),
    )
    mode_scale: float = option(
        1.29,
        "Scale of mode.",
        range=Range(1.75, "the density is negative beyond", at_least=-1),
        idle=(ON_SDXL,),
    )
    precondition_outputs: bool = option(
        False,
        "Weigh the error of the velocity by the square of the noise level, so that it is that of"
        " the clean image, as diffusers' script for SD3 does unless it is given 0.",
        idle=(ON_SDXL,),
    )
    timestep_shift: str = option(
        "pipeline",
        "Noise levels: shifted as the pipeline shifts them at this resolution, or, where that"
        " depends on the resolution (FLUX, Qwen-Image), none, as in diffusers' scripts.",
        choices=("pipeline", "none"),
        idle=(ON_SDXL,),
    )
