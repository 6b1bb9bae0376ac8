"""Options of images, validation and output, and all options of the image script as one class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config.lora_sources import LoraSource
from ..config.options import WITHOUT_CHOICE, HeldOutOptions, OutputOptions, StoppingOptions
from ..config.run import RunConfig
from ..core.fields import IgnoredCase, like, option
from ..core.values import (
    ADAPTER_GUIDANCE,
    BATCHES,
    BY_LOSS,
    BY_SAMPLES,
    GUIDANCES,
    SAMPLER_STEPS,
    SHARES,
    SIDES,
    STEPS,
    WORKERS,
    Range,
    read_guidance_source,
)
from ..mini import FOLDERS
from .model_options import (
    DiffusionOptions,
    FlowOptions,
    ModelOptions,
    PriorOptions,
)
from .sampler_options import (
    WITHOUT_ANY_SAMPLES,
    WITHOUT_PROMPT,
    WITHOUT_SAMPLES,
    SamplerOptions,
)

CACHE_AUTO = "auto"
CACHE_FOLDER = "bilora-diffusion"  # name of the folder in the user's cache folder
# Values of torchvision's `InterpolationMode`, with an underscore in place of the hyphen.
INTERPOLATIONS = (
    "lanczos",
    "bicubic",
    "bilinear",
    "box",
    "hamming",
    "nearest",
    "nearest_exact",
)
SEVERAL_SETS = "list them as concepts in a YAML file, and give that as --dataset (docs/data.md)"
# Cases in which options have no effect.
ON_ONE_CONFIGURATION = IgnoredCase(
    lambda v: bool(v["instance_data_dir"]) or v["dataset_name"] in FOLDERS,
    "on a folder or a built-in set, which has only one",
)
WITHOUT_HELDOUT_IMAGES = IgnoredCase(
    lambda v: not v["validation_dataset"],
    "without held-out images",
    "add `--validation_dataset` or drop it",
)


@dataclass(frozen=True)
class DataOptions:
    """The training images, their captions and masks, and how they are cropped and cached."""

    section: ClassVar[str] = "training images"

    dataset_name: str | None = option(
        None,
        "Images to train on: hub id; local folder of images, with or without metadata.jsonl or"
        " metadata.csv; mini; mini-animals (12 pictures, quickly overfitted); mini-duotone,"
        " mini-gray or mini-pastel (mini in other colors); or a YAML file with a list of concepts,"
        " each with its own options (docs/data.md). linoyts/3d_icon and mini come with the paper's"
        " prompts.",
        aliases=("--dataset",),
        is_path=True,
        itemized=True,
        fix_if_repeated=SEVERAL_SETS,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a data set that has several.", ignored=(ON_ONE_CONFIGURATION,)
    )
    instance_data_dir: str | None = option(
        None,
        "Local folder of images to train on; give either this option or --dataset.",
        is_path=True,
        fix_if_repeated=SEVERAL_SETS,
    )
    image_column: str = option(
        "image", "Column that holds the images, in a data set that is not a folder of image files."
    )
    # `derived.PRESETS` has other defaults of captions, prompts and held-out images for some sets.
    caption_column: str | None = option(
        None,
        "Column that holds the captions; none ignores all captions. Default in a folder without a"
        " metadata file: the .txt file of the same name next to each image. Images without a"
        " caption get --instance_prompt.",
    )
    instance_prompt: str | None = option(
        None,
        "Prompt for images without a caption, for example 'a photo of TOK dog'. Required unless all"
        " images have captions or the data set comes with a prompt.",
    )
    # This and the next option exclude each other (config/constraints.toml).
    mask_column: str | None = option(
        None,
        "Column that holds the masks, each as large as its image: bright areas are learned, dark"
        " areas are not. Default in a folder: NAME.mask.png next to NAME.jpg. Images without a mask"
        " are learned completely.",
    )
    alpha_mask: bool = option(False, "Use the images' alpha channels as masks.")
    # Below 1, since a mask would have no effect at 1.
    unmasked_weight: float = option(
        0.0, "Weight of the loss outside a mask, in [0, 1); inside, it is 1.", range=SHARES
    )
    trigger_word: str | None = option(
        None,
        "Word to put in front of captions and of the instance prompt, for example TOK. Texts that"
        " already contain this word do not change.",
    )
    shuffle_tags: bool = option(
        False,
        "Shuffle the comma-separated tags of the caption for each training sample; tags with the"
        " trigger word stay in front. Each image has at most eight orders.",
    )
    caption_dropout: float = option(
        0.0,
        "Fraction of training samples, in [0, 1), whose caption is replaced by the default negative"
        " prompt (zeros for SDXL base, otherwise the empty prompt), so that the unconditional"
        " prediction is trained too.",
        range=SHARES,
    )
    repeats: int = option(
        1,
        "How often each image appears in one epoch.",
        range=Range(
            10_000, "memory must hold the order of a whole epoch; use more epochs", at_least=1
        ),
    )
    # `derived.with_model_defaults` sets the default, the resolution of the base model.
    resolution: int = option(
        None,
        "Side of the training images in pixels, a multiple of 8, or of 16 for flow-matching models."
        " Default: the resolution that the pipeline was made for (SDXL 1024, mini 64).",
        range=SIDES,
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Crop each image to the size with the closest aspect ratio; all images of a step have the"
        " same size. auto uses aspect ratios from 1:2 to 2:1 and at most as many pixels as a square"
        " of --resolution; or give sizes as height,width;height,width. Default: this square.",
    )
    center_crop: bool = option(
        False, "Crop the center of each image, not a random position for each training sample."
    )
    random_flip: bool = option(False, "Mirror half of the training samples left to right.")
    image_interpolation_mode: str = option(
        "lanczos", "Interpolation for resizing images.", choices=INTERPOLATIONS
    )
    skip_bad_images: bool = option(False, "Skip and list unreadable images instead of stopping.")
    cache_latents: str = option(
        "auto",
        "Encode each image once and cache its latents: yes (or the flag without a value), no, or"
        " auto, which does so for images that always have the same crop, in sets of at most 2000.",
        choices=("auto", "yes", "no"),
        may_change_on_resume=True,
    )
    disk_cache: str = option(
        CACHE_AUTO,
        "Folder that keeps latents and prompt embeddings for later runs; no disables this cache;"
        f" auto is ~/.cache/{CACHE_FOLDER}, or {CACHE_FOLDER} in $XDG_CACHE_HOME if this is set.",
        is_path=True,
        may_change_on_resume=True,
    )
    dataloader_num_workers: int = option(
        0,
        "Processes that read images ahead; 0 reads them in the training process.",
        range=WORKERS.or_zero,
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class ImageStoppingOptions(StoppingOptions):
    """Early stopping and the choice of the best step, by measurements on held-out images."""

    choose_by: str = like(
        StoppingOptions,
        "choose_by",
        default=BY_SAMPLES,
        help="Measure that --keep_best and --early_stopping_patience use: samples, the distance"
        " from images generated for held-out captions (8 at most) to their pictures; or loss, the"
        " held-out loss, which is cheaper but reaches its minimum long before images are best.",
        choices=(BY_SAMPLES, BY_LOSS),
    )
    # `derived.with_choice_guidance` sets the default.
    choice_guidance_from: float | str = option(
        ADAPTER_GUIDANCE,
        "Like --validation_guidance_from, for the images of --choose_by samples. Default: that"
        " option if it is given, otherwise 0.5; but adapter if the model makes no unconditional"
        " prediction, or with --method full, PiSSA or LoRA-GA, which change the base weights.",
        read=read_guidance_source,
        ignored=(
            WITHOUT_CHOICE,
            IgnoredCase(lambda v: v["choose_by"] == BY_LOSS, "with `--choose_by loss`"),
        ),
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class ValidationOptions:
    """Images that are generated during training, and measurements on held-out images.

    As in diffusers' scripts, "validation" has both meanings in the names of these options:
    generated images (``validation_prompt``, ``validation_epochs``) and measurements on held-out
    images (``validation_dataset``, ``validation_loss_steps``).
    """

    section: ClassVar[str] = "validation"
    may_change_on_resume: ClassVar[bool] = True

    validation_prompt: str | None = option(
        None, "Prompt to generate images for, during training and at the end."
    )
    final_validation_prompt: str | None = option(
        None,
        "Prompt to generate images for only at the end, unless --validation_epochs is given.",
        ignored=(
            IgnoredCase(
                lambda v: v["final_validation_prompt"] not in v["validation_prompts"],
                "with `--validation_prompt`, whose images are generated at the end too",
            ),
        ),
    )
    # `derived.with_validation_prompts` collects the prompts of all three options here.
    validation_prompts: list[str] = option(  # noqa: RUF009
        [],
        "Several validation prompts, or one text file with a prompt on each line. A prompt can have"
        " its own settings in kohya's form: --n negative prompt, --w and --h size, --d seed,"
        " --l guidance, --s steps, --am strength of the adapter (docs/guide.md).",
        itemized=True,
    )
    # The default is that of diffusers' scripts; presets have another one.
    num_validation_images: int = option(
        4,
        "Number of images for each prompt; 0 for none. Default for the six prompts that come with"
        " linoyts/3d_icon and the mini sets: 1 each.",
        range=Range(10_000, "every prompt gets this many images", at_least=0),
        ignored=(WITHOUT_PROMPT,),
    )
    validation_epochs: int | None = option(
        None,
        "Generate validation images every this many epochs. Default: with each checkpoint, so that"
        " each step with images can be exported.",
        range=STEPS,
        ignored=(WITHOUT_PROMPT,),
    )
    validation_num_inference_steps: int | None = option(
        None,
        "Sampler steps for validation images. Default: 25, or for models that are distilled to a"
        " few steps, the number of these steps.",
        range=SAMPLER_STEPS,
        ignored=(WITHOUT_SAMPLES,),
    )
    # `families.base.Family.usual_sampling` sets this default and that of the number of steps.
    validation_guidance_scale: float | None = option(
        None,
        "Guidance scale for validation images. Default: the usual scale of the model, or no"
        " guidance with --guided_target and for distilled models that work without it"
        " (docs/models.md).",
        range=GUIDANCES,
        ignored=(WITHOUT_SAMPLES,),
    )
    validation_guidance_from: float | str = option(
        ADAPTER_GUIDANCE,
        "Model for guidance's unconditional prediction: adapter, the adapted model, as in other"
        " programs; base, the base model, which keeps more of a learned style; or a number between"
        " 0 and 1, the adapter's strength in that prediction (docs/guide.md).",
        read=read_guidance_source,
        ignored=(WITHOUT_SAMPLES,),
    )
    # The default is that of diffusers' scripts.
    sample_batch_size: int = option(
        4,
        "Number of images that each device generates at a time, for prompts, --choose_by samples"
        " and --with_prior_preservation. Fewer take less memory.",
        range=BATCHES,
        ignored=(WITHOUT_ANY_SAMPLES,),
    )
    skip_final_inference: bool = option(
        False,
        "Generate no validation images at the end of training.",
        ignored=(WITHOUT_PROMPT,),
    )
    eval_on_start: bool = option(
        False, "Also generate validation images before training, for the viewer's base column."
    )
    validation_dataset: str | None = option(
        None,
        "Held-out images to measure on: hub id, local folder or built-in set; none turns off the"
        " default. Default for mini: mini-heldout, for mini-animals: mini-animals-heldout, and so"
        " on.",
        is_path=True,
    )
    max_eval_samples: int | None = like(
        HeldOutOptions, "max_eval_samples", ignored=(WITHOUT_HELDOUT_IMAGES,)
    )
    # `config.derived.default_validation_loss_steps` sets the default.
    validation_loss_steps: int = option(
        0,
        "Measure the held-out loss, and with --choose_by samples the distance of samples, every"
        " this many steps; 0 measures only at the start and the end. Default with --keep_best or"
        " --early_stopping_patience: five measurements, or twenty with --choose_by loss.",
        range=STEPS.or_zero,
        ignored=(WITHOUT_HELDOUT_IMAGES,),
    )
    # `derived.default_image_model` sets the default.
    image_model: str = option(
        "dinov2:facebook/dinov2-base",
        "Model whose embeddings measure the distance from a sample to a picture:"
        " dinov2:ID_OR_FOLDER, or embedded, the scorer of the miniatures and their default.",
        ignored=(WITHOUT_CHOICE,),
    )


@dataclass(frozen=True)
class ImageOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    # `derived.default_output_kohya_format` sets the default.
    output_kohya_format: bool = option(
        True,
        "Also write the LoRA with kohya's keys for ComfyUI, A1111 and others, which read no other"
        " format for SDXL; the file is named after the run. Default for other models: no.",
    )
    upcast_before_saving: bool = option(
        False,
        "Accepted so that diffusers' command lines work. Trained weights are always saved in fp32.",
        ignored=(
            IgnoredCase(lambda _: True, "on trained weights, which are kept and saved in fp32"),
        ),
    )


@dataclass(frozen=True)
class ImageOptions(
    ModelOptions,
    DataOptions,
    DiffusionOptions,
    FlowOptions,
    PriorOptions,
    ImageStoppingOptions,
    ValidationOptions,
    SamplerOptions,
    ImageOutputOptions,
    RunConfig,
):
    """All options of the image script, and facts from the base model's files.

    Attributes:
        given_options: names of the options that the command line or its recipe sets.
        lora_sources: LoRA files that options name, by the option's name.
        validation_settings: settings of each prompt in ``validation_prompts`` (`PromptOptions`); []
            if no prompt has settings.
        concepts: options of each concept, including its name as "concept"; [] for a run with a
            single image set.
        concept: name of the concept, in one of `DreamBoothConfig.concept_configs`.
        pipeline: name of the base model's pipeline class.
        embeds_guidance: True if the denoiser has a guidance embedding, which training must provide.
        is_unguided: True if sampling makes no unconditional prediction by default.
        unguided_scale: largest guidance scale at which the pipeline makes no unconditional
            prediction.
    """

    given_options: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    lora_sources: dict[str, LoraSource] = field(default_factory=dict)
    validation_settings: list[dict[str, Any]] = field(default_factory=list)
    concepts: list[dict[str, Any]] = field(default_factory=list)
    concept: str = ""
    pipeline: str = ""
    embeds_guidance: bool = False
    is_unguided: bool = False
    unguided_scale: float = 1.0

    modality: ClassVar[str] = "image"

    @property
    def source(self) -> str:
        """Name or folder of the training images."""
        return str(self.dataset_name or self.instance_data_dir)
