"""Options of the base model, the text encoders, the noise levels and the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.fields import IgnoredCase, option, unless
from ..core.values import (
    DECAYS,
    FACTORS,
    GUIDANCES,
    MODEL_SHIFT,
    NO_SHIFT,
    PIPELINE_SHIFT,
    RATES,
    STEPS,
    Range,
)
from .base_model import SDXL_BASE, folder_of
from .families import SDXL

# The recommended weight, and interval in steps, for holding the unconditional prediction. Change of
# the samples' score in points, compared with plain LoRA (step 300, guidance 4, five seeds), on
# two-color icons and on icons in their original colors: +6.6 and -0.1 with weight 1, +6.9 and -0.3
# with weight 4, +7.2 and -0.3 with weight 1 in every 4th step. Holding in every 16th step takes 8 %
# more time.
HOLDING_WEIGHT, HOLDING_PERIOD = 1, 16
# Cases in which options have no effect.
ON_A_LOCAL_MODEL = IgnoredCase(
    lambda v: (
        v["pretrained_vae_model_name_or_path"] is None
        and folder_of(v["pretrained_model_name_or_path"]) is not None
    ),
    "on a local model",
    "give a hub id or drop it",
)
WITHOUT_HOLDING = IgnoredCase(
    lambda v: not v["hold_unconditional"],
    "without `--hold_unconditional`",
    f"add `--hold_unconditional {HOLDING_WEIGHT}` or drop it",
)
BEFORE_HOLDING = IgnoredCase(
    lambda v: (
        v["max_train_steps"] is not None and v["max_train_steps"] < v["hold_unconditional_every"]
    ),
    "in a run of fewer steps than `--hold_unconditional_every`",
    "give a smaller `--hold_unconditional_every` or drop it",
)
WITHOUT_PRIOR = unless("with_prior_preservation", True, "without prior preservation")
WITHOUT_ANY_PRIOR = IgnoredCase(
    lambda v: not v["with_prior_preservation"] and not v["prior_prediction_weight"],
    "without prior preservation",
    "add `--prior_prediction_weight 1` or `--with_prior_preservation`, or drop it",
)
ON_FROZEN_ENCODERS = unless("train_text_encoder", True, "on frozen text encoders")
ON_SDXL = IgnoredCase(
    lambda v: v["pipeline"] == SDXL,
    "on Stable Diffusion XL, which is not a flow model",
)
WITHOUT_GUIDANCE = IgnoredCase(
    lambda v: not v["embeds_guidance"], "on a model without a guidance embedding"
)


@dataclass(frozen=True)
class ModelOptions:
    """Options of the pipeline to fine-tune."""

    section: ClassVar[str] = "base model"

    # Some image sets have another default (`derived.Preset.model`).
    pretrained_model_name_or_path: str = option(
        SDXL_BASE,
        "Pipeline to fine-tune, of Stable Diffusion XL or a flow-matching model: hub id, local"
        " folder, mini or mini-flow. Default with --dataset mini, mini-animals or a recolored"
        " version of these: mini.",
        is_path=True,
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Autoencoder to use instead of the pipeline's. It encodes and decodes in fp32 at every"
        " --mixed_precision.",
        is_path=True,
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", ignored=(ON_A_LOCAL_MODEL,)
    )
    # On resume the file may be in another place, but its hash and strength must be the same
    # (`config.lora_sources`).
    assistant_lora: str | None = option(
        None,
        "LoRA file in the format of diffusers, kohya or PEFT, as FILE or FILE:STRENGTH, that is"
        " active in training and in the held-out loss: a training adapter for a distilled model, or"
        " the style of the training images, to keep it out of the trained file. It is not trained,"
        " not exported, and not active while images are generated.",
        is_path=True,
        may_change_on_resume=True,
    )
    offload: bool = option(
        False,
        "Keep the autoencoder on the CPU, except while it encodes or decodes. Frozen text encoders"
        " leave the device in any case after all prompts are embedded.",
        may_change_on_resume=True,
    )
    # `derived.quantization_of` converts it to a value of `quantize`.
    bnb_quantization_config_path: str | None = option(
        None,
        "JSON file with a bitsandbytes configuration, as in diffusers' scripts. A configuration of"
        " NF4 is the same as --quantize nf4; any other is refused.",
        is_path=True,
        may_change_on_resume=True,
    )
    variant: str | None = option(
        None, "Variant of the model's weight files, for example fp16 for *.fp16.safetensors."
    )
    cache_dir: str | None = option(
        None, "Folder for downloaded models and data sets.", is_path=True, may_change_on_resume=True
    )


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of image models for text encoders, noise levels, the loss and attention."""

    section: ClassVar[str] = "text encoders and loss"

    train_text_encoder: bool = option(
        False, "Also train both text encoders of Stable Diffusion XL."
    )
    # `config.derived.default_text_encoder_lr` sets the default.
    text_encoder_lr: float | None = option(
        None,
        "Learning rate of the text encoders. Default: 5e-6, or --learning_rate with prodigy.",
        range=RATES,
        ignored=(
            ON_FROZEN_ENCODERS,
            IgnoredCase(
                lambda v: (
                    v["optimizer"] == "prodigy" and v["text_encoder_lr"] != v["learning_rate"]
                ),
                "on prodigy, which has one rate for all",
                "give `--learning_rate` alone",
                becomes="learning_rate",
            ),
        ),
    )
    adam_weight_decay_text_encoder: float = option(
        1e-3,  # as in diffusers' script
        "Weight decay of the trained text encoders.",
        range=DECAYS,
        ignored=(ON_FROZEN_ENCODERS,),
    )
    do_edm_style_training: bool = option(
        False,
        "Use the EDM formulation (arXiv 2206.00364) on any Stable Diffusion XL model. A model with"
        " an EDM scheduler always uses it.",
    )
    snr_gamma: float | None = option(
        None,
        "Weight the loss by min-SNR with this gamma (arXiv 2303.09556); 5 is usual.",
        range=Range(1e6, "no schedule has a higher signal-to-noise ratio", greater_than=0),
    )
    snr_weighting: str = option(
        "published",
        "Weights of --snr_gamma for models that predict velocity. published: min(snr, gamma) /"
        " (snr + 1), as in Section 3.4 of arXiv 2303.09556, so that the clean image's error has the"
        " same weight as in models that predict noise. diffusers: min(snr, gamma) / snr + 1, as in"
        " diffusers' script.",
        choices=("published", "diffusers"),
        ignored=(
            IgnoredCase(
                lambda v: v["snr_gamma"] is None,
                "on an unweighted loss",
                "add `--snr_gamma 5` or drop it",
            ),
        ),
    )
    noise_offset: float = option(
        0.0,
        "Offset noise: add to the noise a normal random number for each channel, times this factor,"
        " so that very dark and very light images can be learned; 0.05 to 0.1 is usual. It is the"
        " same as in diffusers' advanced script and kohya's scripts for Stable Diffusion XL.",
        range=FACTORS,
    )
    # `config.check_level_range` requires two numbers.
    timestep_range: list[float] = option(  # noqa: RUF009 (see `lora_layers`)
        [0.0, 1.0],
        "Lowest and highest noise level to train on, as fractions of the full noise, such as 0 0.8"
        " (kohya's --min_timestep and --max_timestep divided by 1000). The distribution within the"
        " range does not change, and the held-out loss still covers all levels.",
        range=Range(1, "1 is the full noise", at_least=0),
    )
    hold_unconditional: float = option(
        0.0,
        "Hold the unconditional prediction, which guidance moves away from, at the base model's. In"
        " some steps, the loss gets an additional term: this weight times the squared change that"
        " the adapters make to the prediction for the empty prompt on the training images."
        f" {HOLDING_WEIGHT} is recommended for strong styles, which guidance otherwise weakens"
        " (docs/methods.md).",
        range=FACTORS,
        ignored=(BEFORE_HOLDING,),
    )
    hold_unconditional_every: int = option(
        HOLDING_PERIOD,
        "Interval of --hold_unconditional in steps; 16 holds in step 16, step 32 and so on. A step"
        " that holds takes more than twice as long.",
        range=STEPS,
        ignored=(WITHOUT_HOLDING,),
    )
    guided_target: float = option(
        1.0,
        "Learn the prediction of guidance at this scale, computed with the base model's"
        " unconditional prediction, so that images keep a strong style with little or no guidance."
        " By default, validation images are then generated without guidance, in half the time"
        " (docs/methods.md). 1 is the plain target, as in diffusers' scripts.",
        range=Range(100, "far smaller scales already spoil images", at_least=1),
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xFormers' attention instead of PyTorch's.", may_change_on_resume=True
    )
    compile: bool = option(
        False,
        "Compile the denoiser's repeated blocks, including the adapters, with torch.compile for the"
        " training steps. A compiler must be installed (docs/guide.md).",
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class FlowOptions:
    """Options of flow-matching transformers: SD3, FLUX and later models."""

    section: ClassVar[str] = "flow-matching models"

    lora_layers: list[str] = option(  # noqa: RUF009 (each instance gets a new list)
        [],
        "Denoiser layers that get adapters, for any image model: groups (attention, feed-forward,"
        " convolutions, all-linear, all) and endings of layer names (to_k, ff.net.2), separated by"
        " commas, plus signs or spaces, such as attention+feed-forward. Default: attention, the"
        " attention projections.",
        aliases=("--lora_target_modules",),
    )
    max_sequence_length: int | None = option(
        None,
        "Maximum number of prompt tokens that are read. Default: as in diffusers' script for the"
        " model (see the table in docs/models.md).",
        range=Range(4096, "no text encoder of these models reads more", at_least=1),
        ignored=(ON_SDXL,),
    )
    # The defaults of this option and of `max_sequence_length` are in `families.base.Family`.
    guidance_scale: float | None = option(
        None,
        "Guidance scale that a distilled model with a guidance embedding (FLUX.1-dev) gets in"
        " training. Default: 3.5, as in diffusers' script.",
        range=GUIDANCES,
        ignored=(ON_SDXL, WITHOUT_GUIDANCE),
    )
    # The default is `families.base.Family.weighting`.
    weighting_scheme: str | None = option(
        None,
        "How noise levels are sampled (logit_normal, mode) or weighted (sigma_sqrt, cosmap); see"
        " Section 3.1 of arXiv 2403.03206. Default: as in diffusers' script for the model (see the"
        " table in docs/models.md).",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        ignored=(ON_SDXL,),
    )
    # The defaults of the next three options are those of diffusers' scripts.
    logit_mean: float = option(
        0.0,
        "Mean of the normal distribution in logit_normal.",
        range=Range(20, "all noise levels would be nearly equal", at_least=-20),
        ignored=(ON_SDXL,),
    )
    logit_std: float = option(
        1.0,
        "Standard deviation of the normal distribution in logit_normal.",
        range=Range(100, "only the two ends would be sampled", greater_than=0),
        ignored=(ON_SDXL,),
    )
    mode_scale: float = option(
        1.29,
        "Scale of the mode distribution.",
        range=Range(1.75, "a larger scale makes the density negative", at_least=-1),
        ignored=(ON_SDXL,),
    )
    precondition_outputs: bool = option(
        False,
        "Multiply the velocity's squared error by the squared noise level, which turns it into the"
        " clean image's error. diffusers' script for SD3 does so unless its option of the same name"
        " is 0.",
        ignored=(ON_SDXL,),
    )
    timestep_shift: float | str = option(
        MODEL_SHIFT,
        "Shift of the noise levels in training: model, the shift that the model's authors used"
        " (docs/models.md); pipeline, the shift for generating images; none; or a number s, which"
        " turns evenly spaced levels t into s t / (1 + (s - 1) t).",
        range=Range(100, "all noise levels would be nearly equal", greater_than=0),
        words=(MODEL_SHIFT, PIPELINE_SHIFT, NO_SHIFT),
        ignored=(ON_SDXL,),
    )


@dataclass(frozen=True)
class PriorOptions:
    """Options of prior preservation, which keeps the model from forgetting the class."""

    section: ClassVar[str] = "prior preservation"

    with_prior_preservation: bool = option(
        False, "Also train on images of the class. The base model generates missing ones."
    )
    # Prior preservation requires this option and the class prompt (config/constraints.toml).
    class_data_dir: str | None = option(
        None,
        "Folder of the class images, which is created and filled if necessary.",
        is_path=True,
        ignored=(WITHOUT_PRIOR,),
    )
    class_prompt: str | None = option(
        None, "Prompt that describes the class.", ignored=(WITHOUT_ANY_PRIOR,)
    )
    prior_prediction_weight: float = option(
        0.0,
        "Preserve the class without class images: the loss gets an additional term, this weight"
        " times the squared change that the adapters make to the prediction for --class_prompt on"
        " the training images. A step takes more than twice as long.",
        range=FACTORS,
    )
    num_class_images: int = option(
        100,
        "Number of class images.",
        range=Range(100_000, "a missing image takes a second or more to generate", at_least=1),
        ignored=(WITHOUT_PRIOR,),
    )
    prior_loss_weight: float = option(
        1.0,
        "Weight of the class images in the loss.",
        range=FACTORS,
        ignored=(WITHOUT_PRIOR,),
    )
    # `families.base.Family.precision` sets the default.
    prior_generation_precision: str | None = option(
        None,
        "Precision for generating class images. Default on a GPU: fp16, or for flow-matching models"
        " bf16 if the GPU supports it, otherwise fp32. Default on a CPU: fp32.",
        choices=("no", "fp32", "fp16", "bf16"),
        ignored=(WITHOUT_PRIOR,),
    )
