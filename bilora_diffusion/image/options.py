"""Options that only the image script has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.options import OutputOptions
from ..fields import Idle, option, unless
from ..mini import FOLDERS
from ..values import BATCHES, DECAYS, FACTORS, RATES, SHARES, WORKERS, Range
from . import inputs
from .base_model import SDXL_BASE, folder_of

INTERPOLATIONS = (
    *("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"),
    "nearest_exact",
)
WITHOUT_PRIOR = unless("with_prior_preservation", True, "without prior preservation")
WITHOUT_ANY_PRIOR = Idle(
    lambda v: not v["with_prior_preservation"] and not v["prior_prediction_weight"],
    "without prior preservation",
    "add `--prior_prediction_weight 1` or `--with_prior_preservation`, or drop it",
)
ON_A_FOLDER_OF_FILES = Idle(
    lambda v: bool(v["instance_data_dir"]), "on a folder, whose images are files"
)
ON_ONE_CONFIGURATION = Idle(
    lambda v: bool(v["instance_data_dir"]) or v["dataset_name"] in FOLDERS,
    "on a folder or a built-in set, which has one",
)
ON_A_LOCAL_MODEL = Idle(
    lambda v: (
        v["pretrained_vae_model_name_or_path"] is None
        and folder_of(v["pretrained_model_name_or_path"]) is not None
    ),
    "on a local model",
    "give a hub id or drop it",
)
ON_FROZEN_ENCODERS = unless("train_text_encoder", True, "on frozen text encoders")


@dataclass(frozen=True)
class ModelOptions:
    """The pipeline that is fine-tuned."""

    section: ClassVar[str] = "base model"

    pretrained_model_name_or_path: str = option(
        SDXL_BASE,
        "Pipeline to start from, of Stable Diffusion XL or a flow-matching model: hub id, local"
        " folder, or mini. With --dataset mini or mini-animals it defaults to mini.",
        place=True,
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Autoencoder to use instead of the pipeline's own. SDXL base in fp16 defaults to"
        " madebyollin/sdxl-vae-fp16-fix, since its own overflows there.",
        place=True,
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", idle=(ON_A_LOCAL_MODEL,)
    )
    offload: bool = option(
        False,
        "Keep the autoencoder on the CPU while it neither encodes nor decodes. Text encoders that"
        " are not trained stay there anyway once all prompts are embedded.",
        free=True,
    )
    bnb_quantization_config_path: str | None = option(
        None,
        "JSON file for bitsandbytes, as diffusers' scripts take it: one that asks for NF4 is"
        " --quantize nf4, any other is refused.",
        place=True,
        free=True,
    )
    variant: str | None = option(
        None, "Which files of the model to take, for example fp16 for *.fp16.safetensors."
    )
    cache_dir: str | None = option(
        None, "Folder for downloaded models and data sets.", place=True, free=True
    )


@dataclass(frozen=True)
class DataOptions:
    """The images and what is done to them."""

    section: ClassVar[str] = "training images"

    dataset_name: str | None = option(
        None,
        "Images to learn from: hub id, local folder (images alone, or with metadata.jsonl or"
        " metadata.csv), mini, or mini-animals (12 pictures, soon overfitted). linoyts/3d_icon and"
        " mini bring the paper's prompts along.",
        aliases=("--dataset",),
        place=True,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a set that has several.", idle=(ON_ONE_CONFIGURATION,)
    )
    instance_data_dir: str | None = option(
        None, "Local folder of images to learn from; give either this or --dataset.", place=True
    )
    image_column: str = option(
        "image", "Column that holds the images.", idle=(ON_A_FOLDER_OF_FILES,)
    )
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
    mask_column: str | None = option(
        None,
        "Column of masks, as large as the images: bright is learned, dark is not. Default: in a"
        " folder, NAME.mask.png beside NAME.jpg; images without a mask are learned whole.",
    )
    alpha_mask: bool = option(False, "Take the images' own opacity for their masks.")
    unmasked_weight: float = option(
        0.0, "What the loss outside of a mask counts, in [0, 1); inside it is 1.", range=SHARES
    )
    trigger_word: str | None = option(
        None,
        "Word that captions begin with, TOK for example; one that has it as a word of its own stays"
        " as it is.",
    )
    shuffle_tags: bool = option(
        False,
        "Shuffle what stands between the commas of a caption, at each visit; what has the trigger"
        " word stays in front. Each image has up to eight orders.",
    )
    caption_dropout: float = option(
        0.0,
        "Share of visits that see no caption but what guidance leads away from (zeros for SDXL"
        " base, else the empty prompt), in [0, 1), so that guidance keeps its other side.",
        range=SHARES,
    )
    repeats: int = option(
        1,
        "How often each image appears in one epoch.",
        range=Range(
            10_000, "the order of a whole epoch is drawn at once; use more epochs", at_least=1
        ),
    )
    resolution: int = option(
        None,
        "Side of the training images in pixels, a multiple of 8. Default: the size that the"
        " pipeline was made for (SDXL 1024, mini 64).",
        range=Range(
            8192,
            "a larger image alone takes the autoencoder over 34 GB a layer",
            at_least=8,
            multiple_of=8,
        ),
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Cut images to sizes of their own shape, each step to one: auto for some up to 1:2 and 2:1"
        " with the pixels of --resolution, or height,width;height,width. Default: squares.",
    )
    center_crop: bool = option(
        False, "Cut the middle of an image; otherwise a place is drawn anew at each visit."
    )
    random_flip: bool = option(False, "Mirror half of the visits left to right.")
    image_interpolation_mode: str = option(
        "lanczos", "How images are resized.", choices=INTERPOLATIONS
    )
    skip_bad_images: bool = option(
        False, "Leave unreadable images out, and list them, instead of stopping."
    )
    cache_latents: str = option(
        "auto",
        "Encode each image once and keep its latents: yes (or the flag alone), no, or auto, which"
        " keeps those of images that are always cropped alike.",
        choices=("auto", "yes", "no"),
        free=True,
    )
    disk_cache: str = option(
        inputs.CACHE_AUTO,
        "Folder in which latents and prompt embeddings stay for the next run, no for none, or auto:"
        f" ~/.cache/{inputs.CACHE}, or below $XDG_CACHE_HOME.",
        place=True,
        free=True,
    )
    dataloader_num_workers: int = option(
        0,
        "Processes that read images ahead; 0 reads them in the training process.",
        range=WORKERS.or_zero,
        free=True,
    )


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of image models alone: text encoders, noise levels, their attention."""

    section: ClassVar[str] = "text encoders and loss"

    train_text_encoder: bool = option(False, "Train adapters on both text encoders too.")
    text_encoder_lr: float | None = option(
        None,
        "Learning rate of the text encoders. Default: 5e-6; on prodigy --learning_rate.",
        range=RATES,
        idle=(
            ON_FROZEN_ENCODERS,
            Idle(
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
        1e-3,
        "Weight decay of the text encoders' adapters.",
        range=DECAYS,
        idle=(ON_FROZEN_ENCODERS,),
    )
    do_edm_style_training: bool = option(
        False, "Use the EDM formulation (arXiv 2206.00364) on any base model."
    )
    snr_gamma: float | None = option(
        None,
        "Weigh the loss by min-SNR with this gamma (arXiv 2303.09556); 5 is usual.",
        range=Range(1e6, "no signal-to-noise ratio of a schedule is higher", above=0),
    )
    snr_weighting: str = option(
        "published",
        "--snr_gamma for models that predict velocity: min(snr, gamma) / (snr + 1), as Section 3.4"
        " of arXiv 2303.09556 has it, by which they weigh the error of the clean image as models"
        " that predict noise do; or min(snr, gamma) / snr + 1, as diffusers' script.",
        choices=("published", "diffusers"),
        idle=(
            Idle(
                lambda v: v["snr_gamma"] is None,
                "on an unweighted loss",
                "add `--snr_gamma 5` or drop it",
            ),
        ),
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xFormers' attention instead of PyTorch's.", free=True
    )
    compile: bool = option(
        False,
        "Compile the denoiser's repeated blocks for training steps, adapters included, by"
        " torch.compile; it needs a compiler (docs/trouble.md).",
        free=True,
    )


@dataclass(frozen=True)
class PriorOptions:
    """Prior preservation: class images that keep the model from forgetting."""

    section: ClassVar[str] = "prior preservation"

    with_prior_preservation: bool = option(
        False, "Train on images of the class too, which the base model makes where they lack."
    )
    class_data_dir: str | None = option(
        None,
        "Folder of the class images; it is made and filled if need be.",
        place=True,
        idle=(WITHOUT_PRIOR,),
    )
    class_prompt: str | None = option(
        None, "Prompt that stands for the class.", idle=(WITHOUT_ANY_PRIOR,)
    )
    prior_prediction_weight: float = option(
        0.0,
        "Keep the class without images of it: this much counts, in the loss, by what the adapters"
        " change the prediction for --class_prompt on the training images. A step takes twice as"
        " long.",
        range=FACTORS,
    )
    num_class_images: int = option(
        100,
        "How many class images there must be.",
        range=Range(100_000, "each lacking one is generated, in a second or more", at_least=1),
        idle=(WITHOUT_PRIOR,),
    )
    prior_loss_weight: float = option(
        1.0,
        "Weight of the class images in the loss.",
        range=FACTORS,
        idle=(WITHOUT_PRIOR,),
    )
    sample_batch_size: int = option(
        4,
        "Images that are generated at a time, on each device.",
        range=BATCHES,
        idle=(WITHOUT_PRIOR,),
        free=True,
    )
    prior_generation_precision: str | None = option(
        None,
        "Precision in which class images are generated. Default: on an accelerator fp16, for"
        " flow-matching models bf16, where it has that; else fp32.",
        choices=("no", "fp32", "fp16", "bf16"),
        idle=(WITHOUT_PRIOR,),
    )


@dataclass(frozen=True)
class ImageOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    output_kohya_format: bool = option(
        True,
        "Write the LoRA under kohya's keys too, for ComfyUI, A1111 and others, which read nothing"
        " else; the file is named after the run.",
    )
    upcast_before_saving: bool = option(
        False,
        "Taken for the sake of diffusers' scripts: what is trained is kept and saved in 32 bits.",
        idle=(
            Idle(
                lambda _: True, "on what is trained here, which is kept and saved in 32 bits anyway"
            ),
        ),
    )
