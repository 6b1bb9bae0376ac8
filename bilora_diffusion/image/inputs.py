"""Options of what is trained on: the pipeline, the images, the class images, the loss."""

from dataclasses import dataclass

from ..config.fields import option

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
INTERPOLATIONS = (
    "lanczos",
    "bicubic",
    "bilinear",
    "box",
    "hamming",
    "nearest",
    "nearest_exact",
)


@dataclass(frozen=True)
class ModelOptions:
    """The pipeline that is fine-tuned."""

    _argument_group_name = "base model"

    pretrained_model_name_or_path: str = option(
        SDXL_BASE,
        "Stable Diffusion XL pipeline to start from: hub id, local folder, or mini. With --dataset"
        " mini it defaults to mini.",
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Autoencoder to use instead of the pipeline's own. SDXL base in fp16 defaults to"
        " madebyollin/sdxl-vae-fp16-fix, since its own overflows there.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    variant: str | None = option(
        None, "Which files of the model to take, for example fp16 for *.fp16.safetensors."
    )
    cache_dir: str | None = option(None, "Folder for downloaded models and data sets.")


@dataclass(frozen=True)
class DataOptions:
    """The images and what is done to them."""

    _argument_group_name = "training images"

    dataset_name: str | None = option(
        None,
        "Images to learn from: hub id, local folder (images alone, or with metadata.jsonl or"
        " metadata.csv), or mini. linoyts/3d_icon and mini bring the paper's prompts along.",
        aliases=["--dataset"],
    )
    dataset_config_name: str | None = option(None, "Configuration of a set that has several.")
    instance_data_dir: str | None = option(
        None, "Local folder of images to learn from; give either this or --dataset."
    )
    image_column: str = option("image", "Column that holds the images.")
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
    repeats: int = option(1, "How often each image appears in one epoch.")
    resolution: int | None = option(
        None,
        "Side of the training images in pixels, a multiple of 8. Default: the size that the"
        " pipeline was made for (SDXL 1024, mini 64).",
    )
    center_crop: bool = option(
        False, "Cut the middle of an image; otherwise a square is drawn anew at each visit."
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
        "Encode each image once and keep its latents: yes, no, or auto, where nothing about the"
        " images changes between visits.",
        choices=("auto", "yes", "no"),
    )
    dataloader_num_workers: int = option(
        0, "Processes that read images ahead; 0 reads them in the training process."
    )


@dataclass(frozen=True)
class PriorOptions:
    """Prior preservation: class images that keep the model from forgetting."""

    _argument_group_name = "prior preservation"

    with_prior_preservation: bool = option(
        False, "Train on images of the class too, which the base model makes where they lack."
    )
    class_data_dir: str | None = option(
        None, "Folder of the class images; it is made and filled if need be."
    )
    class_prompt: str | None = option(None, "Prompt that stands for the class images.")
    num_class_images: int = option(100, "How many class images there must be.")
    prior_loss_weight: float = option(1.0, "Weight of the class images in the loss.")
    sample_batch_size: int = option(4, "Images that are generated at a time, on each device.")
    prior_generation_precision: str | None = option(
        None,
        "Precision in which class images are generated. Default: fp16 on an accelerator, else"
        " fp32.",
        choices=("no", "fp32", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class DiffusionOptions:
    """What only image models have: text encoders, noise levels, their attention."""

    _argument_group_name = "text encoders and loss"

    train_text_encoder: bool = option(False, "Train adapters on both text encoders too.")
    text_encoder_lr: float | None = option(
        None, "Learning rate of the text encoders. Default: 5e-6; on prodigy --learning_rate."
    )
    adam_weight_decay_text_encoder: float = option(
        1e-3, "Weight decay of the text encoders' adapters."
    )
    do_edm_style_training: bool = option(
        False, "Use the EDM formulation (arXiv 2206.00364) on any base model."
    )
    snr_gamma: float | None = option(
        None, "Weigh the loss by min-SNR with this gamma (arXiv 2303.09556); 5 is usual."
    )
    snr_weighting: str = option(
        "published",
        "--snr_gamma for models that predict velocity: min(snr, gamma) / (snr + 1), as Section 3.4"
        " of arXiv 2303.09556 has it, by which they weigh the error of the clean image as models"
        " that predict noise do; or min(snr, gamma) / snr + 1, as diffusers' script.",
        choices=("published", "diffusers"),
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xFormers' attention instead of PyTorch's."
    )
