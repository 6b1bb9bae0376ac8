"""Options for generating images, which have no effect on a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.options import WITHOUT_CHOICE
from ..core.fields import IgnoredCase, option
from ..core.values import BY_LOSS
from .model_options import WITHOUT_PRIOR

# Cases in which options have no effect.
WITHOUT_PROMPT = IgnoredCase(
    lambda v: not v["validation_prompts"] and v["num_validation_images"] > 0,
    "without a prompt",
    "add `--validation_prompt` or drop it",
)
WITHOUT_SAMPLES = IgnoredCase(
    lambda v: WITHOUT_PROMPT.when(v) and (WITHOUT_CHOICE.when(v) or v["choose_by"] == BY_LOSS),
    "without a prompt",
    "add `--validation_prompt` or drop it",
)
WITHOUT_ANY_SAMPLES = IgnoredCase(
    lambda v: WITHOUT_SAMPLES.when(v) and WITHOUT_PRIOR.when(v),
    "where no images are generated",
    "add `--validation_prompt` or drop it",
)


@dataclass(frozen=True)
class SamplerOptions:
    """Options that are used only to generate images, such as a distillation of the base model."""

    section: ClassVar[str] = "validation"
    may_change_on_resume: ClassVar[bool] = True

    # If generated images choose the weights, the file's hash and strength may not change on resume,
    # but its path may (`config.SAMPLING_OPTIONS`).
    sampling_lora: str | None = option(
        None,
        "LoRA file in the format of diffusers, kohya or PEFT, as FILE or FILE:STRENGTH, that is"
        " active only while images are generated (validation and --choose_by samples), such as"
        " Lightning, Hyper, DMD or Turbo. With --validation_num_inference_steps 8"
        " --validation_guidance_scale 1, an image takes 8 forward passes instead of 50"
        " (docs/guide.md). The file is not exported.",
        is_path=True,
        ignored=(WITHOUT_SAMPLES,),
    )
    validation_model: str | None = option(
        None,
        "Another model with the same weight shapes that generates the validation images, together"
        " with the trained adapters, such as Tongyi-MAI/Z-Image-Turbo when Z-Image is trained: hub"
        " id or local folder of a pipeline. Its scheduler and its usual number of steps are used."
        " Between validations its weights are on the CPU.",
        is_path=True,
        ignored=(WITHOUT_SAMPLES,),
    )
    sampling_scheduler: str | None = option(
        None,
        "Scheduler for validation images: its class name in diffusers, and optionally a colon and"
        " settings separated by commas, such as LCMScheduler,"
        " EulerDiscreteScheduler:timestep_spacing=trailing or"
        " FlowMatchEulerDiscreteScheduler:shift=3 (docs/guide.md). Default: the model's scheduler.",
        ignored=(WITHOUT_SAMPLES,),
    )
