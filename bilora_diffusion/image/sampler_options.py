"""Options of sampling that have no effect on training."""

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
    "where no images are sampled",
    "add `--validation_prompt` or drop it",
)


@dataclass(frozen=True)
class SamplerOptions:
    """Options for sampled images only, such as a distillation of the base model."""

    section: ClassVar[str] = "validation"
    may_change_on_resume: ClassVar[bool] = True

    # Its hash and strength are compared on resume, not its place: `config.DreamBoothConfig`.
    sampling_lora: str | None = option(
        None,
        "LoRA file of diffusers, kohya or PEFT, FILE or FILE:STRENGTH, that is active only while"
        " validation images are generated, such as Lightning, Hyper, DMD or Turbo: with"
        " --validation_num_inference_steps 8 --validation_guidance_scale 1 images take 8 passes in"
        " place of 50 (docs/guide.md). It is not exported.",
        is_path=True,
        ignored=(WITHOUT_SAMPLES,),
    )
    validation_model: str | None = option(
        None,
        "Another model of the same shape that validation images are generated from, with its"
        " scheduler and usual steps, such as Tongyi-MAI/Z-Image-Turbo where Z-Image is trained: hub"
        " id or local folder of a pipeline. The adapters act on it. It is on the CPU between"
        " images.",
        is_path=True,
        ignored=(WITHOUT_SAMPLES,),
    )
    sampling_scheduler: str | None = option(
        None,
        "Scheduler with which validation images are generated, by its name in diffusers, and its"
        " settings after a colon, with commas between, such as LCMScheduler,"
        " EulerDiscreteScheduler:timestep_spacing=trailing or"
        " FlowMatchEulerDiscreteScheduler:shift=3 (docs/guide.md). Default: the model's.",
        ignored=(WITHOUT_SAMPLES,),
    )
