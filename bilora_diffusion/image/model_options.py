"""Options of the base model, of noise levels and of losses."""

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

# The recommended weight and interval in steps for holding the unconditional prediction. Points of
# samples against LoRA's (step 300, guidance 4, five seeds) on icons in two colors and in their own:
# +6.6 and -0.1 with weight 1, +6.9 and -0.3 with 4, +7.2 and -0.3 with 1 in every 4th step. Holding
# in every 16th step takes 8 % more time.
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
    "where nothing is held",
    f"add `--hold_unconditional {HOLDING_WEIGHT}` or drop it",
)
BEFORE_HOLDING = IgnoredCase(
    lambda v: (
        v["max_train_steps"] is not None and v["max_train_steps"] < v["hold_unconditional_every"]
    ),
    "in a run that ends before its first such step",
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
    lambda v: not v["embeds_guidance"], "on a model that has no embedding of guidance"
)


@dataclass(frozen=True)
class ModelOptions:
    """The pipeline that is fine-tuned."""

    section: ClassVar[str] = "base model"

    # Derived for some sets of images, by `derived.Preset.model`.
    pretrained_model_name_or_path: str = option(
        SDXL_BASE,
        "Pipeline to start from, of Stable Diffusion XL or a flow-matching model: hub id, local"
        " folder, or mini. With --dataset mini, mini-animals or mini-duotone it defaults to mini.",
        is_path=True,
    )
    # Derived: `derived.default_vae`.
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Autoencoder to use instead of the pipeline's own. SDXL base in fp16 defaults to"
        " madebyollin/sdxl-vae-fp16-fix, since its own overflows there.",
        is_path=True,
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", ignored=(ON_A_LOCAL_MODEL,)
    )
    # Its hash and strength may not change on resume, its place may: `config.lora_sources`.
    assistant_lora: str | None = option(
        None,
        "LoRA file of diffusers, kohya or PEFT, FILE or FILE:STRENGTH, that is active in training"
        " only: a training adapter for a distilled model, or a style that is kept on what is"
        " trained. It is not trained, not exported, and off while images are generated.",
        is_path=True,
        may_change_on_resume=True,
    )
    offload: bool = option(
        False,
        "Keep the autoencoder on the CPU while it neither encodes nor decodes. Text encoders that"
        " are not trained stay there anyway once all prompts are embedded.",
        may_change_on_resume=True,
    )
    # Becomes `quantize`: `derived.quantization_of`.
    bnb_quantization_config_path: str | None = option(
        None,
        "JSON file for bitsandbytes, as diffusers' scripts take it: one that asks for NF4 is"
        " --quantize nf4, any other is refused.",
        is_path=True,
        may_change_on_resume=True,
    )
    variant: str | None = option(
        None, "Which files of the model to take, for example fp16 for *.fp16.safetensors."
    )
    cache_dir: str | None = option(
        None, "Folder for downloaded models and data sets.", is_path=True, may_change_on_resume=True
    )


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of image models only: text encoders, noise levels, attention."""

    section: ClassVar[str] = "text encoders and loss"

    train_text_encoder: bool = option(False, "Train adapters on both text encoders too.")
    # Derived: `config.derived.default_text_encoder_lr`.
    text_encoder_lr: float | None = option(
        None,
        "Learning rate of the text encoders. Default: 5e-6; on prodigy --learning_rate.",
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
        "Weight decay of the text encoders' adapters.",
        range=DECAYS,
        ignored=(ON_FROZEN_ENCODERS,),
    )
    do_edm_style_training: bool = option(
        False, "Use the EDM formulation (arXiv 2206.00364) on any base model."
    )
    snr_gamma: float | None = option(
        None,
        "Weigh the loss by min-SNR with this gamma (arXiv 2303.09556); 5 is usual.",
        range=Range(1e6, "no signal-to-noise ratio of a schedule is higher", greater_than=0),
    )
    snr_weighting: str = option(
        "published",
        "--snr_gamma for models that predict velocity: min(snr, gamma) / (snr + 1), as Section 3.4"
        " of arXiv 2303.09556 has it, by which they weigh the error of the clean image as models"
        " that predict noise do; or min(snr, gamma) / snr + 1, as diffusers' script.",
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
        "Offset noise: add this times a normal number of each channel to the noise, so that dark"
        " and light images are learned too; 0.05 to 0.1 is usual. As in diffusers' advanced script"
        " and kohya's scripts for Stable Diffusion XL.",
        range=FACTORS,
    )
    # Two numbers: `config.check_level_range`.
    timestep_range: list[float] = option(  # noqa: RUF009 (as `lora_layers`)
        [0.0, 1.0],
        "Lowest and highest noise level that is trained, as shares of the full noise, such as 0 0.8"
        " (kohya's --min_timestep and --max_timestep over 1000). Levels within keep their"
        " distribution; the held-out loss has all levels.",
        range=Range(1, "it is the full noise", at_least=0),
    )
    hold_unconditional: float = option(
        0.0,
        "Hold the unconditional prediction, which guidance leads away from, at the base model's:"
        " weight, in the loss of some steps, of the change that the adapters make to the prediction"
        f" for the empty prompt on the training images. {HOLDING_WEIGHT} is recommended for strong"
        " styles, which guidance otherwise weakens (docs/methods.md).",
        range=FACTORS,
        ignored=(BEFORE_HOLDING,),
    )
    hold_unconditional_every: int = option(
        HOLDING_PERIOD,
        "Hold it in one of so many steps, such as the 16th, the 32nd and so on. Such a step takes"
        " more than twice as long.",
        range=STEPS,
        ignored=(WITHOUT_HOLDING,),
    )
    guided_target: float = option(
        1.0,
        "Train towards what guidance of this scale would predict, with the base model's"
        " unconditional prediction, so that images keep a strong style without guidance or with"
        " little: they are sampled without, in half the time (docs/methods.md). 1 is the plain"
        " target, as in diffusers' scripts.",
        range=Range(100, "images are spoiled by far less", at_least=1),
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xFormers' attention instead of PyTorch's.", may_change_on_resume=True
    )
    compile: bool = option(
        False,
        "Compile the denoiser's repeated blocks for training steps, adapters included, by"
        " torch.compile; it needs a compiler (docs/guide.md).",
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class FlowOptions:
    """Options of flow-matching transformers: SD3, FLUX and later models."""

    section: ClassVar[str] = "flow-matching models"

    lora_layers: list[str] = option(  # noqa: RUF009 (the field makes a new list for each instance)
        [],
        "Layers of the denoiser that get adapters, of any image model: groups (attention,"
        " feed-forward, convolutions, all-linear, all) and the ends of layers' names (to_k,"
        " ff.net.2), with commas, plus signs or spaces between, such as attention+feed-forward."
        " Default: attention, its projections.",
        aliases=("--lora_target_modules",),
    )
    max_sequence_length: int | None = option(
        None,
        "Tokens of a prompt that are read. Default: as diffusers' script for the model"
        " (docs/models.md has the table).",
        range=Range(4096, "no text encoder of these models reads more", at_least=1),
        ignored=(ON_SDXL,),
    )
    # Derived: `families.base.Family.guidance_scale`, as `max_sequence_length` above.
    guidance_scale: float | None = option(
        None,
        "Guidance that a distilled model with an embedding of it (FLUX.1-dev) gets in training."
        " Default: 3.5, as diffusers' script.",
        range=GUIDANCES,
        ignored=(ON_SDXL, WITHOUT_GUIDANCE),
    )
    # Derived: `families.base.Family.weighting`.
    weighting_scheme: str | None = option(
        None,
        "How noise levels are sampled (logit_normal, mode) or weighted (sigma_sqrt, cosmap; arXiv"
        " 2403.03206, Section 3.1). Default: as diffusers' script for the model (docs/models.md has"
        " the table).",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        ignored=(ON_SDXL,),
    )
    # The defaults of these three are those of diffusers' scripts.
    logit_mean: float = option(
        0.0,
        "Mean of logit_normal.",
        range=Range(20, "all levels would be alike", at_least=-20),
        ignored=(ON_SDXL,),
    )
    logit_std: float = option(
        1.0,
        "Standard deviation of logit_normal.",
        range=Range(100, "only the two ends would be sampled", greater_than=0),
        ignored=(ON_SDXL,),
    )
    mode_scale: float = option(
        1.29,
        "Scale of mode.",
        range=Range(1.75, "the density is negative beyond", at_least=-1),
        ignored=(ON_SDXL,),
    )
    precondition_outputs: bool = option(
        False,
        "Weight the error of the velocity by the square of the noise level, which makes it the"
        " error of the clean image, as diffusers' script for SD3 does unless it is given 0.",
        ignored=(ON_SDXL,),
    )
    timestep_shift: float | str = option(
        MODEL_SHIFT,
        "Shift of the noise levels in training: model, that of its authors (docs/models.md);"
        " pipeline, that of sampling; none; or a number s, by which evenly spaced levels t become"
        " s t / (1 + (s - 1) t).",
        range=Range(100, "all noise levels would be alike", greater_than=0),
        words=(MODEL_SHIFT, PIPELINE_SHIFT, NO_SHIFT),
        ignored=(ON_SDXL,),
    )


@dataclass(frozen=True)
class PriorOptions:
    """Prior preservation: class images that keep the model from forgetting."""

    section: ClassVar[str] = "prior preservation"

    with_prior_preservation: bool = option(
        False, "Train on images of the class too; the base model generates those that are missing."
    )
    # This and the prompt are required with prior preservation (config/constraints.toml).
    class_data_dir: str | None = option(
        None,
        "Folder of the class images; it is made and filled if necessary.",
        is_path=True,
        ignored=(WITHOUT_PRIOR,),
    )
    class_prompt: str | None = option(
        None, "Prompt that stands for the class.", ignored=(WITHOUT_ANY_PRIOR,)
    )
    prior_prediction_weight: float = option(
        0.0,
        "Keep the class without images of it: weight, in the loss, of the change that the adapters"
        " make to the prediction for --class_prompt on the training images. A step takes twice as"
        " long.",
        range=FACTORS,
    )
    num_class_images: int = option(
        100,
        "Number of class images.",
        range=Range(100_000, "each missing one is generated, in a second or more", at_least=1),
        ignored=(WITHOUT_PRIOR,),
    )
    prior_loss_weight: float = option(
        1.0,
        "Weight of the class images in the loss.",
        range=FACTORS,
        ignored=(WITHOUT_PRIOR,),
    )
    # Derived: `families.base.Family.precision`.
    prior_generation_precision: str | None = option(
        None,
        "Precision in which class images are generated. Default: on an accelerator fp16, for"
        " flow-matching models bf16, where it has that; else fp32.",
        choices=("no", "fp32", "fp16", "bf16"),
        ignored=(WITHOUT_PRIOR,),
    )
