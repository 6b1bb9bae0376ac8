"""The flags of diffusers' train_dreambooth_lora_sdxl.py (0.42), and where one means something else
here.

The one table of it: diffusers.md shows it, and the tests hold command lines drawn at random to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bilora_diffusion.image.inputs import TABLE_A8_STEPS

Default = Any | Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Flag:
    """A flag of that script.

    Args:
        name: it, without dashes.
        default: its value there.
        here: what differs here, in a sentence or two of Markdown; "" where nothing does.
        defaults: what decides how training goes, and its value here (or a function of all values),
            unless it or one of `unless` is given.
        unless: the flags whose presence leaves nothing different.
    """

    name: str
    default: Any
    here: str
    defaults: Mapping[str, Default]
    unless: tuple[str, ...]


def flag(
    name: str, default: Any, here: str = "", unless: tuple[str, ...] = (), **defaults: Default
) -> Flag:
    """An entry of `FLAGS`."""
    return Flag(name, default, here, MappingProxyType(defaults), (*unless, *defaults))


def _rate(values: Mapping[str, Any]) -> float:
    return 1.0 if str(values["optimizer"]).lower() == "prodigy" else 2e-4


FLAGS: tuple[Flag, ...] = (
    flag("pretrained_model_name_or_path", None, "Not required; `mini` is the miniature."),
    flag(
        "pretrained_vae_model_name_or_path",
        None,
        "SDXL base in fp16 gets `madebyollin/sdxl-vae-fp16-fix` where none is given.",
    ),
    flag("revision", None),
    flag("variant", None),
    flag(
        "dataset_name",
        None,
        "Also `--dataset`; also a folder, or `mini`. `linoyts/3d_icon` and `mini` bring the"
        " paper's prompts along.",
    ),
    flag("dataset_config_name", None),
    flag("instance_data_dir", None, "Captions that lie in the folder are read."),
    flag("cache_dir", None),
    flag("image_column", "image"),
    flag(
        "caption_column",
        None,
        "Read from a folder's metadata too; there passed over with `--instance_data_dir`.",
    ),
    flag("repeats", 1),
    flag("class_data_dir", None, "Images that lack are made at `--resolution`."),
    flag(
        "instance_prompt", None, "Not required where images have captions or the set has a prompt."
    ),
    flag("class_prompt", None),
    flag("validation_prompt", None, "`--validation_prompts` takes more of them."),
    flag("num_validation_images", 4, "Of each prompt; 1 for the six of the paper's sets."),
    flag(
        "validation_epochs",
        50,
        "Images after every 25th epoch and at the end; there after the first, and then every"
        " so many.",
    ),
    flag("do_edm_style_training", False),
    flag("with_prior_preservation", False),
    flag("prior_loss_weight", 1.0),
    flag("num_class_images", 100),
    flag(
        "output_dir",
        "lora-dreambooth-model",
        "A run that stands there is not replaced, unless `--overwrite_output_dir` says so.",
    ),
    flag(
        "output_kohya_format",
        False,
        "On, since ComfyUI and A1111 read nothing else; `--no_output_kohya_format` turns it"
        " off. The file is named after the run.",
    ),
    flag("seed", None, "Every run is seeded."),
    flag(
        "resolution",
        1024,
        "The size that the model was made for. Only multiples of 8, since latents have no"
        " parts of a pixel, and SDXL would be told another size than it sees.",
    ),
    flag("center_crop", False, "Without it a square is drawn anew at each visit; there once."),
    flag("random_flip", False, "Drawn anew at each visit; there once."),
    flag("train_text_encoder", False),
    flag(
        "train_batch_size",
        4,
        "1, also where only `--gradient_accumulation_steps` is given.",
        train_batch_size=1,
    ),
    flag("sample_batch_size", 4),
    flag("num_train_epochs", 1, "Without it and `--max_train_steps`, steps count."),
    flag(
        "max_train_steps",
        None,
        "500 where neither it nor `--num_train_epochs` is given (Table A8).",
        unless=("num_train_epochs",),
        max_train_steps=TABLE_A8_STEPS,
    ),
    flag("checkpointing_steps", 500, "A checkpoint is called `checkpoints/step-N`."),
    flag("checkpoints_total_limit", None, "The last two; 0 keeps all."),
    flag(
        "resume_from_checkpoint",
        None,
        "`latest` is refused where there is none; `auto` then starts afresh, as `latest` does"
        " there. A resumed run sees the data that an uninterrupted one would have seen.",
    ),
    flag(
        "gradient_accumulation_steps",
        1,
        "4 where neither is given (Table A8: 4 images a step); 1 where only"
        " `--train_batch_size` is.",
        unless=("train_batch_size",),
        gradient_accumulation_steps=4,
    ),
    flag("gradient_checkpointing", False, "On for CUDA from 512 pixels on; takes `False`."),
    flag(
        "learning_rate",
        1e-4,
        "Table A8's; 1.0 for prodigy. The auxiliary of Bi-LoRA has the same, unless"
        " `--auxiliary_learning_rate` is given.",
        learning_rate=_rate,
    ),
    flag(
        "text_encoder_lr",
        5e-6,
        "The default holds where text encoders are trained. 0 is refused; there it means"
        " `--learning_rate`.",
    ),
    flag("scale_lr", False, "Scales `--auxiliary_learning_rate` too, where it is given."),
    flag("lr_scheduler", "constant"),
    flag(
        "snr_gamma",
        None,
        "For models that predict velocity the weight is min(snr, gamma) / (snr + 1), as"
        " published (arXiv 2303.09556, Section 3.4); `--snr_weighting diffusers` gives that"
        " script's, min(snr, gamma) / snr + 1. 0 is refused: nothing would be learned.",
    ),
    flag("lr_warmup_steps", 500, "Table A8 has no warm-up.", lr_warmup_steps=0),
    flag("lr_num_cycles", 1),
    flag("lr_power", 1.0),
    flag("dataloader_num_workers", 0),
    flag("optimizer", "AdamW", "An unknown name is refused; there it means AdamW."),
    flag("use_8bit_adam", False),
    flag("adam_beta1", 0.9),
    flag("adam_beta2", 0.999),
    flag("prodigy_beta3", None),
    flag("prodigy_decouple", True, "`False` turns it off; there every word turns it on."),
    flag("adam_weight_decay", 1e-4, "Not for the auxiliary of Bi-LoRA, which climbs."),
    flag("adam_weight_decay_text_encoder", 1e-3),
    flag("adam_epsilon", 1e-8, "0 is refused: the first step of a LoRA would be 0 / 0."),
    flag(
        "prodigy_use_bias_correction", True, "`False` turns it off; there every word turns it on."
    ),
    flag("prodigy_safeguard_warmup", True, "`False` turns it off; there every word turns it on."),
    flag(
        "max_grad_norm",
        1.0,
        "The auxiliary of Bi-LoRA is not clipped, nor counted. 0 is refused: nothing would be"
        " learned.",
    ),
    flag("push_to_hub", False),
    flag("hub_token", None, "Never written down; refused with `--report_to all` too."),
    flag("hub_model_id", None),
    flag("logging_dir", "logs"),
    flag("allow_tf32", False),
    flag("report_to", "tensorboard", "`none` and more trackers; the default needs no package."),
    flag(
        "mixed_precision",
        None,
        "bf16, or else fp16, where the GPU has it and `accelerate` says nothing.",
    ),
    flag("prior_generation_precision", None, "`no` means fp32; there it means the default."),
    flag(
        "local_rank",
        -1,
        "Above 0 it is refused without the variable `LOCAL_RANK`: each process would train on"
        " its own.",
    ),
    flag("enable_xformers_memory_efficient_attention", False),
    flag(
        "rank",
        4,
        "Alpha is twice the rank, as in the paper; there it is the rank, which `--lora_alpha`"
        " gives. A line says so where `--rank` comes alone.",
        lora_alpha=lambda values: 2.0 * values["rank"],
    ),
    flag("lora_dropout", 0.0),
    flag("use_dora", False),
    flag("image_interpolation_mode", "lanczos"),
)
DEFAULTS = {flag.name: flag.default for flag in FLAGS}

BESIDE_FLAGS = (
    "Flags are written out: `--resume latest` for `--resume_from_checkpoint` is refused.",
    "A flag that has no effect beside others is named in one line and set aside, where that script"
    " warns or says nothing; the table is in [options.md](options.md).",
    "Adapters start as PEFT's do (A kaiming-uniform, B zero); `--init_lora_weights gaussian` is"
    " that script's start.",
    "An epoch counts as many steps as there, class images included. Its last step is filled up from"
    " the next epoch, where there it is a smaller one.",
    "Class images are told to SDXL with their own size and crop; there with those of the instance"
    " image beside them.",
)


def default_here(values: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """What stands here for flags that a command line leaves out, where diffusers has another.

    Args:
        values: of every flag, with diffusers' defaults.
        given: the flags that the command line gives.
    """
    return {
        name: default(values) if callable(default) else default
        for entry in FLAGS
        if not given & set(entry.unless)
        for name, default in entry.defaults.items()
    }
