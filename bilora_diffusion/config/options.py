"""Options of both training scripts, except those of adapters and methods (`methods.options`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.fields import IgnoredCase, option, unless
from ..core.values import (
    BATCHES,
    BY_LOSS,
    BY_SAMPLES,
    BY_SCORE,
    DECAYS,
    RATES,
    ROWS,
    SHARES,
    STEPS,
    Range,
)
from . import machine

PRECISIONS = ("no", "fp16", "bf16")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
# Cases in which some options have no effect.
ON_OTHERS = unless("optimizer", "prodigy", "with another optimizer")
AT_A_CONSTANT_RATE = IgnoredCase(
    lambda v: v["lr_scheduler"] == "constant",
    "with a constant learning rate",
    "use `--lr_scheduler constant_with_warmup` or drop it",
)
# The value of ``--compare`` without a control run.
NO_CONTROL = "none"
WITHOUT_UPLOAD = unless("push_to_hub", True, "without an upload")
WITHOUT_CHOICE = IgnoredCase(
    lambda v: not (v["keep_best"] or v["early_stopping_patience"]),
    "if no measurement chooses the weights",
    "add `--keep_best` or drop it",
)


@dataclass(frozen=True)
class StepOptions:
    """Seed, batch size, number of steps and numerical precision."""

    section: ClassVar[str] = "steps and precision"

    # Random numbers and batch size.
    seed: int = option(
        0,
        "Seed of all random numbers: data order, noise, adapters and images.",
        range=Range(2**63 - 1, "random generators take 64-bit seeds", at_least=0),
    )
    # Table A8: batches of 4 images in micro-batches of 1.
    train_batch_size: int = option(
        1,
        "Images per forward pass on each device.",
        range=BATCHES,
    )
    gradient_accumulation_steps: int = option(
        4,
        "Forward passes per optimizer step on each device; 1 if only --train_batch_size is given.",
        range=Range(65_536, "one step would take too many forward passes", at_least=1),
    )
    # Length of the run. If neither option is given, the script has a default: `image.derived` for
    # steps, `text.config` for epochs.
    max_train_steps: int | None = option(
        None,
        "Total number of optimizer steps. Default: 500, unless --num_train_epochs is given.",
        range=STEPS,
    )
    num_train_epochs: int | None = option(
        None,
        "Number of passes over the images, or over the class images if there are more of them."
        " --max_train_steps takes precedence.",
        range=Range(10**6, "no run sees its data more often", at_least=1),
        ignored=(
            IgnoredCase(
                lambda v: v["max_train_steps"] is not None,
                "if the number of steps is given",
                "drop `--max_train_steps` or the epochs",
            ),
        ),
    )
    max_grad_norm: float = option(
        1.0,
        "Maximum norm of the gradients, which are clipped to it, except those of bilora's"
        " auxiliary.",
        range=Range(
            1e30, "fp32 would overflow; far smaller values already clip nothing", greater_than=0
        ),
    )
    # Derived: `default_mixed_precision`.
    mixed_precision: str = option(
        None,
        "Precision of the frozen weights and of the computation. Default: the one given to"
        " accelerate launch (fp16 or bf16); otherwise bf16 on CUDA GPUs that support it, fp16 on"
        " other CUDA GPUs, and no on other devices.",
        choices=PRECISIONS,
    )
    # Derived for images: `image.derived.default_gradient_checkpointing`.
    gradient_checkpointing: bool = option(
        None,
        "Save memory by recomputing activations in the backward pass. Default: on for CUDA if"
        " --resolution is at least 512.",
        may_change_on_resume=True,
    )
    allow_tf32: bool = option(
        False, "Allow CUDA to multiply fp32 matrices in TF32.", may_change_on_resume=True
    )
    # No code reads it; a constraint refuses a value above 0 if the variable LOCAL_RANK is missing.
    local_rank: int = option(
        -1,
        "Set by old launchers; accelerate and torchrun set the variable LOCAL_RANK instead.",
        range=Range(10**6, "no launch has more processes"),
        may_change_on_resume=True,
    )


def default_mixed_precision(options: StepOptions) -> str:
    """Return the precision of accelerate's launcher, else the best one for the device."""
    return machine.default_precision()


@dataclass(frozen=True)
class StoppingOptions:
    """Early stopping and the choice of the best step, by measurements on held-out samples.

    Each script redeclares ``choose_by`` with the measures that it supports.
    """

    section: ClassVar[str] = "when to stop"

    early_stopping_patience: int | None = option(
        None,
        "End the run after this many consecutive held-out measurements without a new best value of"
        " --choose_by; one is made every --validation_loss_steps. The measurement at step 0, where"
        " the adapter has no effect, does not count.",
        range=STEPS,
        may_change_on_resume=True,
    )
    keep_best: bool = option(
        False,
        "Export the weights of the best step by --choose_by instead of those of the last step.",
    )
    choose_by: str = option(
        BY_LOSS,
        "Held-out measure that --keep_best and --early_stopping_patience use.",
        choices=(BY_LOSS, BY_SAMPLES, BY_SCORE),
        ignored=(WITHOUT_CHOICE,),
    )


@dataclass(frozen=True)
class HeldOutOptions:
    """Number of held-out samples; the two scripts list this option in different sections."""

    max_eval_samples: int | None = option(
        None,
        "Measure at most this many held-out samples (of each concept), the same ones in every run."
        " Default: all.",
        aliases=("--max_validation_samples",),
        range=ROWS,
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning rates."""

    section: ClassVar[str] = "optimizer"

    # The rate of Table A8; the text script redeclares the option with the rate of Tables A4 to A6.
    # Derived for Prodigy: `derived.default_learning_rate`.
    learning_rate: float = option(2e-4, "Learning rate. Default with prodigy: 1.0.", range=RATES)
    scale_lr: bool = option(
        False,
        "Multiply --learning_rate and --auxiliary_learning_rate by the batch size, the gradient"
        " accumulation steps and the number of processes. --text_encoder_lr is not scaled, except"
        " with Prodigy.",
    )
    # The schedule of all rates: constant, without a warm-up (Table A8).
    lr_scheduler: str = option("constant", "Schedule of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = option(
        0,
        "Steps over which the learning rate rises from 0; not for constant.",
        range=STEPS.or_zero,
        ignored=(AT_A_CONSTANT_RATE,),
    )
    lr_num_cycles: int = option(
        1,
        "Number of cycles of cosine_with_restarts.",
        range=STEPS,
        ignored=(unless("lr_scheduler", "cosine_with_restarts", "with this schedule"),),
    )
    lr_power: float = option(
        1.0,
        "Exponent of the polynomial schedule.",
        range=Range(100, "the rate would fall to 0 within the first steps", greater_than=0),
        ignored=(unless("lr_scheduler", "polynomial", "with this schedule"),),
    )
    # The optimizer, whose name is converted to lower case, and its settings.
    optimizer: str = option(
        "AdamW",
        "AdamW, adamw8bit or prodigy, in upper or lower case. docs/guide.md says when to use each.",
    )
    use_8bit_adam: bool = option(
        False,
        "The same as --optimizer adamw8bit.",
        ignored=(unless("optimizer", "adamw", "with another optimizer"),),
    )
    # Betas, epsilon and decay have the defaults of diffusers' scripts.
    adam_beta1: float = option(0.9, "The optimizer's first beta.", range=SHARES)
    adam_beta2: float = option(0.999, "The optimizer's second beta.", range=SHARES)
    adam_epsilon: float = option(
        1e-8,
        "The optimizer's epsilon.",
        range=Range(1e3, "the weights would hardly change", greater_than=0),
    )
    adam_weight_decay: float = option(
        1e-4, "Weight decay of the trained weights, except bilora's auxiliary.", range=DECAYS
    )
    # Only for Prodigy.
    prodigy_beta3: float | None = option(
        None,
        "Beta of Prodigy's step-size estimate. Default: the square root of --adam_beta2.",
        ignored=(ON_OTHERS,),
        range=SHARES,
    )
    prodigy_decouple: bool = option(
        True, "Decay weights separately from the gradient, like AdamW.", ignored=(ON_OTHERS,)
    )
    prodigy_use_bias_correction: bool = option(
        True, "Use Adam's bias correction in Prodigy.", ignored=(ON_OTHERS,)
    )
    prodigy_safeguard_warmup: bool = option(
        True,
        "Keep a learning rate that is warming up from affecting Prodigy's step-size estimate.",
        ignored=(ON_OTHERS,),
    )


@dataclass(frozen=True)
class OutputOptions:
    """Run folder, trackers and the hub."""

    section: ClassVar[str] = "output"
    may_change_on_resume: ClassVar[bool] = True

    # The run folder and its checkpoints.
    output_dir: str = option("lora-dreambooth-model", "Folder of the run.", is_path=True)
    overwrite_output_dir: bool = option(
        False,
        "Replace the run in the folder; with --resume_from_checkpoint step-100, delete only its"
        " later steps.",
    )
    # A method's name (`resolving.check_method`), or `NO_CONTROL`.
    compare: str = option(
        NO_CONTROL,
        "After the run, train a control run with this method (such as lora) instead of --method,"
        " on the same data, noise and prompts, into OUTPUT_DIR-METHOD. With none, no control is"
        " trained.",
    )
    checkpointing_steps: int = option(
        100,
        "Steps between checkpoints; Ctrl-C and SIGTERM also save one.",
        range=STEPS,
    )
    checkpoints_total_limit: int | None = option(
        None,
        "Number of checkpoints to keep, the newest ones; 0 keeps all. Default: as many as fit into"
        " 2 GB, at least 2.",
        range=STEPS.or_zero,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Resume a run: auto (from its newest checkpoint, or from the start if there is none),"
        " latest (the same, but there must be a checkpoint), the name of a checkpoint, such as"
        " step-100, or its folder.",
        is_path=True,
    )
    # Records in addition to losses.
    log_dynamics: bool = option(
        False,
        "Record how the adapters change, for python -m eval.dynamics (Figs. 2, A2, A4): the"
        " factors, lora-sam's terms of Eq. 5, and bilora's subspaces and ascent gain.",
    )
    dynamics_steps: int | None = option(
        None,
        "Steps between records of --log_dynamics. Default: about 40 records per run.",
        range=STEPS,
        ignored=(unless("log_dynamics", True, "without --log_dynamics"),),
    )
    # Without training.
    dry_run: bool = option(
        False,
        "Only check the options, and print what would be trained and how much memory that takes."
        " The base model's weights are neither read nor downloaded, and no run folder is written.",
    )
    # Trackers and the hub. Derived where TensorBoard is missing: `default_report_to`.
    logging_dir: str = option("logs", "Folder for the trackers' logs, inside the run folder.")
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (the default if it is installed), wandb, comet_ml, another tracker"
        " that accelerate supports, all, or none.",
    )
    push_to_hub: bool = option(False, "Upload the run folder to the hub at the end.")
    hub_token: str | None = option(
        None, "Token for the upload; it is never stored.", ignored=(WITHOUT_UPLOAD,)
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to. Default: the folder's name.", ignored=(WITHOUT_UPLOAD,)
    )
    config: str | None = option(
        None,
        "Recipe: a YAML file of these options, or the name of one in recipes/, such as flux2_klein."
        " Options on the command line take precedence.",
        is_path=True,
    )


def default_report_to(options: OutputOptions) -> str:
    """Return the declared default, tensorboard, if it is installed; else "none"."""
    return options.report_to if machine.is_installed(options.report_to) else "none"
