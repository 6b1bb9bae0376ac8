"""Options that every training script has beside those of `methods.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.fields import Idle, option
from ..config.values import BATCH, DECAY, RATE, SHARE, STEPS, Most

PRECISIONS = ("no", "fp16", "bf16")
OPTIMIZERS = ("adamw", "prodigy")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
ON_ADAMW = Idle(
    lambda v: v["optimizer"] != "prodigy", "on AdamW", "add `--optimizer prodigy` or drop it"
)
AT_A_CONSTANT_RATE = Idle(
    lambda v: v["lr_scheduler"] == "constant",
    "on a constant learning rate",
    "use `--lr_scheduler constant_with_warmup` or drop it",
)
WITHOUT_UPLOAD = Idle(
    lambda v: not v["push_to_hub"], "without an upload", "add `--push_to_hub` or drop it"
)


def on_other_courses(scheduler: str) -> Idle:
    """What only one course of the learning rate reads."""
    return Idle(
        lambda v: v["lr_scheduler"] != scheduler,
        "on this course of the rate",
        f"use `--lr_scheduler {scheduler}` or drop it",
    )


@dataclass(frozen=True)
class StepOptions:
    """Steps and precision."""

    section: ClassVar[str] = "steps and precision"

    seed: int = option(
        0,
        "Seed of everything random: data, noise, adapters, images.",
        at_least=0,
        most=Most(2**63 - 1, "random generators take 64 bits"),
    )
    train_batch_size: int = option(
        1,
        "Images of one forward pass on one device; 1 too where only"
        " --gradient_accumulation_steps is given.",
        at_least=1,
        most=BATCH,
    )
    gradient_accumulation_steps: int = option(
        4,
        "Forward passes of one optimizer step; 1 where only --train_batch_size is given.",
        at_least=1,
        most=Most(65_536, "one step would take so many forward passes"),
    )
    max_train_steps: int | None = option(
        None,
        "Optimizer steps in all. Default: 500, unless --num_train_epochs is given.",
        at_least=1,
        most=STEPS,
    )
    num_train_epochs: int | None = option(
        None,
        "Passes over the images, or over the class images where these are more; not beside"
        " --max_train_steps.",
        at_least=1,
        most=Most(10**6, "no run sees its data more often"),
        idle=(
            Idle(
                lambda v: v["max_train_steps"] is not None,
                "beside the number of steps, which counts",
                "drop `--max_train_steps` or the epochs",
            ),
        ),
    )
    max_grad_norm: float = option(
        1.0,
        "Norm that the gradients are clipped to.",
        above=0,
        most=Most(1e30, "norms in 32 bits end there; it clips nothing far below already"),
    )
    mixed_precision: str | None = option(
        None,
        "Precision of the frozen weights and of the arithmetic. Default: what accelerate launch"
        " was told (fp16 or bf16); else bf16 on a GPU that has it, fp16 on one that has not, and"
        " no elsewhere.",
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Compute activations twice to save memory. Default: on for CUDA from 512 pixels on.",
        free=True,
    )
    allow_tf32: bool = option(False, "Let CUDA multiply fp32 matrices in TF32.", free=True)
    local_rank: int = option(
        -1,
        "Set by old launchers; accelerate and torchrun say it by the variable LOCAL_RANK.",
        most=Most(10**6, "launchers count processes from 0"),
        free=True,
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning rates."""

    section: ClassVar[str] = "optimizer"

    learning_rate: float = option(
        2e-4, "Learning rate; 1.0 by default for prodigy.", above=0, most=RATE
    )
    scale_lr: bool = option(
        False,
        "Multiply --learning_rate, and --auxiliary_learning_rate where it is given, by batch size,"
        " accumulation and processes; --text_encoder_lr stays.",
    )
    lr_scheduler: str = option("constant", "Course of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = option(
        0,
        "Steps in which it rises from 0; not for constant.",
        at_least=0,
        most=STEPS,
        idle=(AT_A_CONSTANT_RATE,),
    )
    lr_num_cycles: int = option(
        1,
        "Cycles of cosine_with_restarts.",
        at_least=1,
        most=STEPS,
        idle=(on_other_courses("cosine_with_restarts"),),
    )
    lr_power: float = option(
        1.0,
        "Power of polynomial.",
        above=0,
        most=Most(100, "the rate would fall to 0 within the first steps"),
        idle=(on_other_courses("polynomial"),),
    )
    optimizer: str = option("AdamW", "AdamW or prodigy, in upper or lower case.")
    use_8bit_adam: bool = option(
        False,
        "AdamW with 8-bit state, from bitsandbytes.",
        idle=(
            Idle(
                lambda v: v["optimizer"] == "prodigy",
                "on prodigy",
                "use `--optimizer AdamW` or drop it",
            ),
        ),
    )
    adam_beta1: float = option(0.9, "First beta of AdamW and Prodigy.", **SHARE)
    adam_beta2: float = option(0.999, "Second beta of AdamW and Prodigy.", **SHARE)
    adam_epsilon: float = option(
        1e-8,
        "Epsilon of AdamW and Prodigy.",
        above=0,
        most=Most(1e3, "the optimizer would hardly move anything"),
    )
    adam_weight_decay: float = option(1e-4, "Weight decay of the adapters.", at_least=0, most=DECAY)
    prodigy_beta3: float | None = option(
        None,
        "Beta of Prodigy's step size estimate. Default: the square root of the second beta.",
        idle=(ON_ADAMW,),
        **SHARE,
    )
    prodigy_decouple: bool = option(
        True, "Decay weights apart from the gradient, as AdamW does.", idle=(ON_ADAMW,)
    )
    prodigy_use_bias_correction: bool = option(
        True, "Correct Prodigy's averages for their start.", idle=(ON_ADAMW,)
    )
    prodigy_safeguard_warmup: bool = option(
        True,
        "Keep the learning rate out of Prodigy's estimate while it warms up.",
        idle=(ON_ADAMW,),
    )


@dataclass(frozen=True)
class OutputOptions:
    """The run folder, trackers and the hub."""

    section: ClassVar[str] = "output"
    free: ClassVar[bool] = True

    output_dir: str = option("lora-dreambooth-model", "Folder of the run.", place=True)
    overwrite_output_dir: bool = option(False, "Replace the run that the folder holds.")
    checkpointing_steps: int = option(
        100,
        "Save a checkpoint every so many steps; Ctrl-C and SIGTERM save one, too.",
        at_least=1,
        most=STEPS,
    )
    checkpoints_total_limit: int = option(
        2, "Keep the newest so many checkpoints; 0 keeps all.", at_least=0, most=STEPS
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue a run: latest, auto (latest if there is one), or a checkpoint's name or folder.",
        place=True,
    )
    log_dynamics: bool = option(
        False,
        "Record how the adapters move, for python -m eval.dynamics (Figs. 2, A2, A4): the factors"
        " themselves, lora-sam's terms of Eq. 5, bilora's subspaces and ascent gain.",
    )
    dynamics_steps: int | None = option(
        None,
        "Record them every so many steps. Default: about 40 times in all.",
        at_least=1,
        most=STEPS,
        idle=(
            Idle(
                lambda v: not v["log_dynamics"],
                "on a run that records none",
                "add `--log_dynamics` or drop it",
            ),
        ),
    )
    logging_dir: str = option("logs", "Folder of the trackers' logs, within the run folder.")
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (used by default where it is installed), wandb, comet_ml, another"
        " that accelerate knows, all, or none.",
    )
    push_to_hub: bool = option(False, "Upload the run folder to the hub at the end.")
    hub_token: str | None = option(
        None, "Token for the upload; it is never written down.", idle=(WITHOUT_UPLOAD,)
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to. Default: the folder's name.", idle=(WITHOUT_UPLOAD,)
    )
    config: str | None = option(
        None,
        "YAML file of options by their names here; options on the command line win.",
        place=True,
    )
