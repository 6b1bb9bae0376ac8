"""Options of the images and losses that show how training of an image model goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.options import HeldOutOptions
from ..fields import Idle, like, option
from ..values import STEPS, Range

WITHOUT_PROMPT = Idle(
    lambda v: not v["validation_prompts"] and v["num_validation_images"] > 0,
    "without a prompt",
    "add `--validation_prompt` or drop it",
)


@dataclass(frozen=True)
class ValidationOptions:
    """Images and losses that show how training goes."""

    section: ClassVar[str] = "validation"
    free: ClassVar[bool] = True

    validation_prompt: str | None = option(
        None, "Prompt to generate images for, during training and at its end."
    )
    final_validation_prompt: str | None = option(
        None,
        "Prompt to generate images for at the end alone, unless --validation_epochs is given.",
        idle=(
            Idle(
                lambda v: v["final_validation_prompt"] not in v["validation_prompts"],
                "beside `--validation_prompt`, whose images are made at the end too",
            ),
        ),
    )
    validation_prompts: list[str] = option(  # noqa: RUF009
        [], "More such prompts, or one text file with a prompt on each line."
    )
    num_validation_images: int = option(
        4,
        "Images for each prompt; 0 for none. The six prompts that linoyts/3d_icon and mini bring"
        " get 1 each by default.",
        range=Range(10_000, "so many of each prompt are generated, one by one", at_least=0),
        idle=(WITHOUT_PROMPT,),
    )
    validation_epochs: int | None = option(
        25, "Generate them every so many epochs.", range=STEPS, idle=(WITHOUT_PROMPT,)
    )
    validation_num_inference_steps: int | None = option(
        None,
        "Steps of the sampler in which they are generated. Default: 25; of models that are"
        " distilled to a few steps as many as these take.",
        range=Range(1000, "no scheduler here has more noise levels", at_least=1),
        idle=(WITHOUT_PROMPT,),
    )
    validation_guidance_scale: float | None = option(
        None,
        "Guidance with which they are generated. Default: what is usual for the model, and none for"
        " distilled ones that take none (docs/models.md).",
        range=Range(100, "images are spoiled by far less", at_least=0),
        idle=(WITHOUT_PROMPT,),
    )
    skip_final_inference: bool = option(
        False,
        "Generate none at the end, but where an epoch of --validation_epochs ends there.",
        idle=(WITHOUT_PROMPT,),
    )
    eval_on_start: bool = option(
        False, "Let the untrained model make them, too: the viewer's column of the base model."
    )
    validation_dataset: str | None = option(
        None,
        "Held-out images to measure the loss on, given like --dataset; none for none. Default for"
        " mini: mini-heldout, for mini-animals: mini-animals-heldout.",
        place=True,
    )
    validation_part: str | None = like(
        HeldOutOptions,
        "validation_part",
        idle=(
            Idle(
                lambda v: not v["validation_dataset"],
                "without held-out images",
                "add `--validation_dataset` or drop it",
            ),
        ),
    )
    validation_loss_steps: int = option(
        0,
        "Measure that loss every so many steps; 0 measures it at the start and the end only."
        " --fit, --keep_best and --early_stopping_patience measure it twenty times by default.",
        range=STEPS.or_zero,
        idle=(
            Idle(
                lambda v: not v["validation_dataset"] and not v["fit"],
                "without held-out images",
                "add `--validation_dataset`, `--fit`, or drop it",
            ),
        ),
    )
