"""Where a command line of diffusers' train_dreambooth_lora_sdxl.py means something else here.

The one table of it: docs/diffusers.md shows it, and the tests hold command lines drawn at random to
it. A flag that is not in it means what it means there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .resolve import TABLE_A8_STEPS

Default = Any | Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Difference:
    """What differs about a flag.

    Args:
        flag: its name.
        here: what differs, in a sentence or two of Markdown.
        defaults: what decides how training goes, and its value here (or a function of all values),
            unless it or one of `unless` is given.
        unless: the flags whose presence leaves nothing different.
    """

    flag: str
    here: str
    defaults: Mapping[str, Default]
    unless: tuple[str, ...]


def _entry(flag: str, here: str, unless: tuple[str, ...] = (), **defaults: Default) -> Difference:
    return Difference(flag, here, MappingProxyType(defaults), (*unless, *defaults))


def _rate(values: Mapping[str, Any]) -> float:
    return 1.0 if str(values["optimizer"]).lower() == "prodigy" else 2e-4


DIFFERENCES: tuple[Difference, ...] = (
    _entry("pretrained_model_name_or_path", "Not required; `mini` is the miniature."),
    _entry(
        "pretrained_vae_model_name_or_path",
        "SDXL base in fp16 gets `madebyollin/sdxl-vae-fp16-fix` where none is given.",
    ),
    _entry(
        "dataset_name",
        "Also `--dataset`; also a folder, or `mini`. `linoyts/3d_icon` and `mini` bring the"
        " paper's prompts along.",
    ),
    _entry(
        "caption_column",
        "Read from a folder's metadata too; there passed over with `--instance_data_dir`.",
    ),
    _entry("instance_data_dir", "Captions that lie in the folder are read."),
    _entry("instance_prompt", "Not required where images have captions or the set has a prompt."),
    _entry("class_data_dir", "Images that lack are made at `--resolution`."),
    _entry("validation_prompt", "`--validation_prompts` takes more of them."),
    _entry("num_validation_images", "Of each prompt; 1 for the six of the paper's sets."),
    _entry(
        "validation_epochs",
        "Images after every 25th epoch and at the end; there after the first, and then every"
        " so many.",
    ),
    _entry(
        "output_dir",
        "A run that stands there is not replaced, unless `--overwrite_output_dir` says so.",
    ),
    _entry(
        "output_kohya_format",
        "On, since ComfyUI and A1111 read nothing else; `--no_output_kohya_format` turns it"
        " off. The file is named after the run.",
    ),
    _entry("seed", "Every run is seeded."),
    _entry(
        "resolution",
        "The size that the model was made for. Only multiples of 8, since latents have no"
        " parts of a pixel, and SDXL would be told another size than it sees.",
    ),
    _entry("center_crop", "Without it a square is drawn anew at each visit; there once."),
    _entry("random_flip", "Drawn anew at each visit; there once."),
    _entry(
        "train_batch_size",
        "1, also where only `--gradient_accumulation_steps` is given.",
        train_batch_size=1,
    ),
    _entry(
        "gradient_accumulation_steps",
        "4 where neither is given (Table A8: 4 images a step); 1 where only"
        " `--train_batch_size` is.",
        unless=("train_batch_size",),
        gradient_accumulation_steps=4,
    ),
    _entry("num_train_epochs", "Without it and `--max_train_steps`, steps count."),
    _entry(
        "max_train_steps",
        "500 where neither it nor `--num_train_epochs` is given (Table A8).",
        unless=("num_train_epochs",),
        max_train_steps=TABLE_A8_STEPS,
    ),
    _entry("checkpointing_steps", "A checkpoint is called `checkpoints/step-N`."),
    _entry("checkpoints_total_limit", "The last two; 0 keeps all."),
    _entry(
        "resume_from_checkpoint",
        "`latest` is refused where there is none; `auto` then starts afresh, as `latest` does"
        " there. A resumed run sees the data that an uninterrupted one would have seen.",
    ),
    _entry("gradient_checkpointing", "On for CUDA from 512 pixels on; takes `False`."),
    _entry(
        "learning_rate",
        "Table A8's; 1.0 for prodigy. The auxiliary of Bi-LoRA has the same, unless"
        " `--auxiliary_learning_rate` is given.",
        learning_rate=_rate,
    ),
    _entry(
        "text_encoder_lr",
        "The default holds where text encoders are trained. 0 is refused; there it means"
        " `--learning_rate`.",
    ),
    _entry("scale_lr", "Scales `--auxiliary_learning_rate` too, where it is given."),
    _entry("lr_warmup_steps", "Table A8 has no warm-up.", lr_warmup_steps=0),
    _entry(
        "snr_gamma",
        "For models that predict velocity the weight is min(snr, gamma) / (snr + 1), as"
        " published (arXiv 2303.09556, Section 3.4); `--snr_weighting diffusers` gives that"
        " script's, min(snr, gamma) / snr + 1. 0 is refused: nothing would be learned.",
    ),
    _entry("optimizer", "An unknown name is refused; there it means AdamW."),
    _entry("prodigy_decouple", "`False` turns it off; there every word turns it on."),
    _entry("prodigy_use_bias_correction", "`False` turns it off; there every word turns it on."),
    _entry("prodigy_safeguard_warmup", "`False` turns it off; there every word turns it on."),
    _entry("adam_weight_decay", "Not for the auxiliary of Bi-LoRA, which climbs."),
    _entry("adam_epsilon", "0 is refused: the first step of a LoRA would be 0 / 0."),
    _entry(
        "max_grad_norm",
        "The auxiliary of Bi-LoRA is not clipped, nor counted. 0 is refused: nothing would be"
        " learned.",
    ),
    _entry("hub_token", "Never written down; refused with `--report_to all` too."),
    _entry("report_to", "`none` and more trackers; the default needs no package."),
    _entry(
        "mixed_precision",
        "bf16, or else fp16, where the GPU has it and `accelerate` says nothing.",
    ),
    _entry("prior_generation_precision", "`no` means fp32; there it means the default."),
    _entry(
        "local_rank",
        "Above 0 it is refused without the variable `LOCAL_RANK`: each process would train on"
        " its own.",
    ),
    _entry(
        "rank",
        "Alpha is twice the rank, as in the paper; there it is the rank, which `--lora_alpha`"
        " gives. A line says so where `--rank` comes alone.",
        lora_alpha=lambda values: 2.0 * values["rank"],
    ),
)

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
        for entry in DIFFERENCES
        if not given & set(entry.unless)
        for name, default in entry.defaults.items()
    }
