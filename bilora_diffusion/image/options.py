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
CACHE_FOLDER = "bilora-diffusion"  # in the user's folder of caches
# torchvision's `InterpolationMode`, with an underscore for its hyphen.
INTERPOLATIONS = (
    "lanczos",
    "bicubic",
    "bilinear",
    "box",
    "hamming",
    "nearest",
    "nearest_exact",
)
SEVERAL_SETS = "write them into a YAML file with a list of concepts, and give that (docs/data.md)"
# Cases in which options have no effect.
ON_A_FOLDER_OF_FILES = IgnoredCase(
    lambda v: bool(v["instance_data_dir"]), "on a folder, whose images are files"
)
ON_ONE_CONFIGURATION = IgnoredCase(
    lambda v: bool(v["instance_data_dir"]) or v["dataset_name"] in FOLDERS,
    "on a folder or a built-in set, which has one",
)
WITHOUT_HELDOUT_IMAGES = IgnoredCase(
    lambda v: not v["validation_dataset"],
    "without held-out images",
    "add `--validation_dataset` or drop it",
)


@dataclass(frozen=True)
class DataOptions:
    """The training images, their texts and masks, and how they are cut and cached."""

    section: ClassVar[str] = "training images"

    dataset_name: str | None = option(
        None,
        "Images to learn from: hub id, local folder (images alone, or with metadata.jsonl or"
        " metadata.csv), mini, mini-animals (12 pictures, soon overfitted), or mini-duotone,"
        " mini-gray or mini-pastel (mini in other colors). linoyts/3d_icon and mini bring the"
        " paper's prompts along. Or a YAML file with a list of concepts, each with"
        " its own options (docs/data.md).",
        aliases=("--dataset",),
        is_path=True,
        itemized=True,
        fix_if_repeated=SEVERAL_SETS,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a set that has several.", ignored=(ON_ONE_CONFIGURATION,)
    )
    instance_data_dir: str | None = option(
        None,
        "Local folder of images to learn from; give either this or --dataset.",
        is_path=True,
        fix_if_repeated=SEVERAL_SETS,
    )
    image_column: str = option(
        "image", "Column that holds the images.", ignored=(ON_A_FOLDER_OF_FILES,)
    )
    # Derived for the sets of `derived.PRESETS`, as are the prompts and the held-out set.
    caption_column: str | None = option(
        None,
        "Column that holds the captions; none reads none. Default: in a folder without metadata,"
        " the .txt file of the same name beside each image. Images without a caption get"
        " --instance_prompt.",
    )
    instance_prompt: str | None = option(
        None,
        "Prompt that stands for the images, for example 'a photo of TOK dog'. Required unless"
        " captions are given or the set brings its own.",
    )
    # This and the next option exclude each other (config/constraints.toml).
    mask_column: str | None = option(
        None,
        "Column of masks, as large as the images: bright is learned, dark is not. Default: in a"
        " folder, NAME.mask.png beside NAME.jpg; images without a mask are learned whole.",
    )
    alpha_mask: bool = option(False, "Take the images' own opacity for their masks.")
    # Below 1: at 1 a mask would have no effect.
    unmasked_weight: float = option(
        0.0, "Weight of the loss outside of a mask, in [0, 1); inside it is 1.", range=SHARES
    )
    trigger_word: str | None = option(
        None,
        "Word that is put in front of captions, TOK for example; a caption that has it as a word"
        " stays as it is.",
    )
    shuffle_tags: bool = option(
        False,
        "Shuffle the tags of a caption, which commas separate, for each training sample; tags with"
        " the trigger word stay in front. Each image has up to eight orders.",
    )
    caption_dropout: float = option(
        0.0,
        "Share of training samples, in [0, 1), that have guidance's negative prompt in place of"
        " their caption (zeros for SDXL base, else the empty prompt), so that the unconditional"
        " prediction is trained too.",
        range=SHARES,
    )
    repeats: int = option(
        1,
        "How often each image appears in one epoch.",
        range=Range(
            10_000, "the order of a whole epoch is made at once; use more epochs", at_least=1
        ),
    )
    # Derived: the side of the base model, in `derived.with_model_defaults`.
    resolution: int = option(
        None,
        "Side of the training images in pixels, a multiple of 8. Default: the size that the"
        " pipeline was made for (SDXL 1024, mini 64).",
        range=SIDES,
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Cut each image to the size that is nearest to its shape; the images of a step have one"
        " size. auto takes sizes up to 1:2 and 2:1 with the pixels of --resolution; or give"
        " height,width;height,width. Default: squares.",
    )
    center_crop: bool = option(
        False, "Cut the middle of each image; otherwise a random place for each training sample."
    )
    random_flip: bool = option(False, "Mirror half of the training samples left to right.")
    image_interpolation_mode: str = option(
        "lanczos", "How images are resized.", choices=INTERPOLATIONS
    )
    skip_bad_images: bool = option(
        False, "Skip unreadable images, and list them, instead of stopping."
    )
    cache_latents: str = option(
        "auto",
        "Encode each image once and cache its latents: yes (or the flag alone), no, or auto, which"
        " caches those of images that are always cropped alike.",
        choices=("auto", "yes", "no"),
        may_change_on_resume=True,
    )
    disk_cache: str = option(
        CACHE_AUTO,
        "Folder in which latents and prompt embeddings stay for the next run, no for none, or auto:"
        f" ~/.cache/{CACHE_FOLDER}, or below $XDG_CACHE_HOME.",
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
    """Early stopping and the best step, by what is measured on held-out images."""

    choose_by: str = like(
        StoppingOptions,
        "choose_by",
        default=BY_SAMPLES,
        help="Measure that --keep_best and --early_stopping_patience use: samples, the distance of"
        " images sampled from held-out captions (8 at most) to their pictures, or loss, the"
        " held-out loss, which is cheaper and is lowest long before images are best.",
        choices=(BY_SAMPLES, BY_LOSS),
    )
    # Derived: `derived.with_choice_guidance`.
    choice_guidance_from: float | str = option(
        ADAPTER_GUIDANCE,
        "As --validation_guidance_from, for the samples of --choose_by samples. Default: that"
        " option where it is given, else 0.5; adapter where the model makes no unconditional"
        " prediction, or where what is trained is not in the adapter alone.",
        read=read_guidance_source,
        ignored=(
            WITHOUT_CHOICE,
            IgnoredCase(lambda v: v["choose_by"] == BY_LOSS, "with `--choose_by loss`"),
        ),
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class ValidationOptions:
    """Sampled images and measurements during training.

    "validation" has two meanings in the names of these options, as in diffusers' scripts: sampled
    images (``validation_prompt``, ``validation_epochs``), and the held-out images that are measured
    (``validation_dataset``, ``validation_loss_steps``).
    """

    section: ClassVar[str] = "validation"
    may_change_on_resume: ClassVar[bool] = True

    validation_prompt: str | None = option(
        None, "Prompt to generate images for, during training and at its end."
    )
    final_validation_prompt: str | None = option(
        None,
        "Prompt to generate images for at the end alone, unless --validation_epochs is given.",
        ignored=(
            IgnoredCase(
                lambda v: v["final_validation_prompt"] not in v["validation_prompts"],
                "with `--validation_prompt`, whose images are generated at the end too",
            ),
        ),
    )
    # All prompts stand here in the end: `derived.with_validation_prompts`.
    validation_prompts: list[str] = option(  # noqa: RUF009
        [],
        "Several such prompts, or one text file with a prompt on each line, with settings of their"
        " own in kohya's form: --n negative prompt, --w and --h size, --d seed, --l guidance,"
        " --s steps, --am strength of the adapter (docs/guide.md).",
        itemized=True,
    )
    # As in diffusers' scripts; presets have another number.
    num_validation_images: int = option(
        4,
        "Images for each prompt; 0 for none. The six prompts that linoyts/3d_icon and mini bring"
        " get 1 each by default.",
        range=Range(10_000, "so many of each prompt are generated, one by one", at_least=0),
        ignored=(WITHOUT_PROMPT,),
    )
    validation_epochs: int | None = option(
        None,
        "Generate them every so many epochs. Default: with each checkpoint, so that each step with"
        " images can be exported.",
        range=STEPS,
        ignored=(WITHOUT_PROMPT,),
    )
    validation_num_inference_steps: int | None = option(
        None,
        "Sampler steps of validation images. Default: 25; of models that are"
        " distilled to a few steps as many as these take.",
        range=SAMPLER_STEPS,
        ignored=(WITHOUT_SAMPLES,),
    )
    # Derived, as the number of steps: `families.base.Family.usual_sampling`.
    validation_guidance_scale: float | None = option(
        None,
        "Guidance scale of validation images. Default: what is usual for the model, and none for"
        " distilled ones that take none (docs/models.md).",
        range=GUIDANCES,
        ignored=(WITHOUT_SAMPLES,),
    )
    validation_guidance_from: float | str = option(
        ADAPTER_GUIDANCE,
        "Model of guidance's unconditional prediction: adapter, the adapted one, as in other"
        " programs; base, the base model, which keeps more of a learned style; or a number between"
        " 0 and 1, the adapter's strength in that prediction (docs/guide.md).",
        read=read_guidance_source,
        ignored=(WITHOUT_SAMPLES,),
    )
    # 4, as in diffusers' scripts.
    sample_batch_size: int = option(
        4,
        "Images that are sampled at a time on each device: those of prompts, of --choose_by samples"
        " and of --with_prior_preservation. Fewer take less memory.",
        range=BATCHES,
        ignored=(WITHOUT_ANY_SAMPLES,),
    )
    skip_final_inference: bool = option(
        False,
        "Generate none at the end of training.",
        ignored=(WITHOUT_PROMPT,),
    )
    eval_on_start: bool = option(
        False, "Let the untrained model generate them too: the viewer's column of the base model."
    )
    validation_dataset: str | None = option(
        None,
        "Held-out images to measure the loss on, given like --dataset; none for none. Default for"
        " mini: mini-heldout, for mini-animals: mini-animals-heldout, and so on.",
        is_path=True,
    )
    max_eval_samples: int | None = like(
        HeldOutOptions, "max_eval_samples", ignored=(WITHOUT_HELDOUT_IMAGES,)
    )
    # Derived: `config.derived.default_validation_loss_steps`.
    validation_loss_steps: int = option(
        0,
        "Measure the held-out loss, and with --choose_by samples the distance of samples, every"
        " so many steps; 0 measures at the start and the end only. --keep_best and"
        " --early_stopping_patience measure five times by default, with --choose_by loss twenty.",
        range=STEPS.or_zero,
        ignored=(WITHOUT_HELDOUT_IMAGES,),
    )
    # Derived: `derived.default_image_model`.
    image_model: str = option(
        "dinov2:facebook/dinov2-base",
        "Model whose embeddings tell how far a sample is from a picture: dinov2:ID_OR_FOLDER, or"
        " embedded, the miniature's own, which is its default.",
        ignored=(WITHOUT_CHOICE,),
    )


@dataclass(frozen=True)
class ImageOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    # Derived: `derived.default_output_kohya_format`.
    output_kohya_format: bool = option(
        True,
        "Write the LoRA under kohya's keys too, for ComfyUI, A1111 and others, which read nothing"
        " else; the file is named after the run.",
    )
    upcast_before_saving: bool = option(
        False,
        "Accepted for the sake of diffusers' command lines: trained weights are saved in 32 bits.",
        ignored=(
            IgnoredCase(
                lambda _: True, "on what is trained here, which is kept and saved in 32 bits anyway"
            ),
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
        given_options: names of the options that the command line or its recipe has.
        lora_sources: LoRA files that options name, by the option's name.
        validation_settings: settings of each of ``validation_prompts`` (`PromptOptions`); [] where
            no prompt has settings.
        concepts: options of each concept, with its name as "concept"; [] for a run of one set of
            images.
        concept: name of the concept, in a configuration of `DreamBoothConfig.concept_configs`.
        pipeline: class of the base model's pipeline.
        embeds_guidance: True if the denoiser has an embedding of guidance, which training gives.
        is_unguided: True if its images have no unconditional prediction by default.
        unguided_scale: largest guidance scale at which its pipeline makes no unconditional
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
        """Name or place of the training images."""
        return str(self.dataset_name or self.instance_data_dir)
