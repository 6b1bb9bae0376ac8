"""Options of both training scripts, without those of adapters and methods (`methods.options`)."""

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
ON_OTHERS = unless("optimizer", "prodigy", "on another optimizer")
AT_A_CONSTANT_RATE = IgnoredCase(
    lambda v: v["lr_scheduler"] == "constant",
    "on a constant learning rate",
    "use `--lr_scheduler constant_with_warmup` or drop it",
)
# The value of ``--compare`` without a control run.
NO_CONTROL = "none"
WITHOUT_UPLOAD = unless("push_to_hub", True, "without an upload")
WITHOUT_CHOICE = IgnoredCase(
    lambda v: not (v["keep_best"] or v["early_stopping_patience"]),
    "where nothing is chosen",
    "add `--keep_best` or drop it",
)


@dataclass(frozen=True)
class StepOptions:
    """Seed, size and number of the steps, and the precision of the arithmetic."""

    section: ClassVar[str] = "steps and precision"

    # Random numbers and the size of a step.
    seed: int = option(
        0,
        "Seed of everything random: data, noise, adapters, images.",
        range=Range(2**63 - 1, "random generators take 64 bits", at_least=0),
    )
    # Table A8: batches of 4 images in micro-batches of 1.
    train_batch_size: int = option(
        1,
        "Images of one forward pass on one device; 1 too where only"
        " --gradient_accumulation_steps is given.",
        range=BATCHES,
    )
    gradient_accumulation_steps: int = option(
        4,
        "Forward passes of one optimizer step; 1 where only --train_batch_size is given.",
        range=Range(65_536, "one step would take so many forward passes", at_least=1),
    )
    # Length of the run. Without either option the script has a default: `image.derived` for steps,
    # `text.config` for epochs.
    max_train_steps: int | None = option(
        None,
        "Optimizer steps in all. Default: 500, unless --num_train_epochs is given.",
        range=STEPS,
    )
    num_train_epochs: int | None = option(
        None,
        "Passes over the images, or over the class images where these are more; not together with"
        " --max_train_steps.",
        range=Range(10**6, "no run sees its data more often", at_least=1),
        ignored=(
            IgnoredCase(
                lambda v: v["max_train_steps"] is not None,
                "together with the number of steps, which is used",
                "drop `--max_train_steps` or the epochs",
            ),
        ),
    )
    max_grad_norm: float = option(
        1.0,
        "Norm that the gradients are clipped to.",
        range=Range(
            1e30, "32 bits end there; far smaller values already clip nothing", greater_than=0
        ),
    )
    # Derived: `default_mixed_precision`.
    mixed_precision: str = option(
        None,
        "Precision of the frozen weights and of the arithmetic. Default: that of accelerate launch"
        " (fp16 or bf16); else bf16 on a GPU that has it, fp16 on another GPU, and no elsewhere.",
        choices=PRECISIONS,
    )
    # Derived for images: `image.derived.default_gradient_checkpointing`.
    gradient_checkpointing: bool = option(
        None,
        "Compute activations twice to save memory. Default: on for CUDA from 512 pixels on.",
        may_change_on_resume=True,
    )
    allow_tf32: bool = option(
        False, "Let CUDA multiply fp32 matrices in TF32.", may_change_on_resume=True
    )
    # No code reads it; a constraint refuses it where the launcher's variable is missing.
    local_rank: int = option(
        -1,
        "Set by old launchers; accelerate and torchrun set the variable LOCAL_RANK instead.",
        range=Range(10**6, "launchers count processes from 0"),
        may_change_on_resume=True,
    )


def default_mixed_precision(options: StepOptions) -> str:
    """The precision of accelerate's launcher, else the best one of the device."""
    return machine.default_precision()


@dataclass(frozen=True)
class StoppingOptions:
    """Early stopping and the best step, by what is measured on held-out samples.

    Each script declares ``choose_by`` once more, with the measures that it has.
    """

    section: ClassVar[str] = "when to stop"

    early_stopping_patience: int | None = option(
        None,
        "End the run after this many held-out measurements in a row, one every"
        " --validation_loss_steps, without a new best one by --choose_by. That of step 0, where"
        " the adapter does nothing, does not count.",
        range=STEPS,
        may_change_on_resume=True,
    )
    keep_best: bool = option(
        False,
        "Save the weights of the best step by --choose_by instead of the last step's.",
    )
    choose_by: str = option(
        BY_LOSS,
        "Measure of held-out samples that --keep_best and --early_stopping_patience use.",
        choices=(BY_LOSS, BY_SAMPLES, BY_SCORE),
        ignored=(WITHOUT_CHOICE,),
    )


@dataclass(frozen=True)
class HeldOutOptions:
    """The number of held-out samples; each script lists it in another section."""

    max_eval_samples: int | None = option(
        None,
        "Measure only so many held-out samples (of each concept), the same ones in every run."
        " Default: all.",
        aliases=("--max_validation_samples",),
        range=ROWS,
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning rates."""

    section: ClassVar[str] = "optimizer"

    # Table A8; the text script declares that of Tables A4 to A6. Derived for Prodigy:
    # `derived.default_learning_rate`.
    learning_rate: float = option(2e-4, "Learning rate; 1.0 by default for prodigy.", range=RATES)
    scale_lr: bool = option(
        False,
        "Multiply --learning_rate and --auxiliary_learning_rate by batch size, accumulation and"
        " processes; --text_encoder_lr stays, except with Prodigy.",
    )
    # The schedule of all rates: constant, without a warm-up (Table A8).
    lr_scheduler: str = option("constant", "Schedule of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = option(
        0,
        "Steps in which the rate rises from 0; not for constant.",
        range=STEPS.or_zero,
        ignored=(AT_A_CONSTANT_RATE,),
    )
    lr_num_cycles: int = option(
        1,
        "Cycles of cosine_with_restarts.",
        range=STEPS,
        ignored=(unless("lr_scheduler", "cosine_with_restarts", "on this schedule"),),
    )
    lr_power: float = option(
        1.0,
        "Power of polynomial.",
        range=Range(100, "the rate would fall to 0 within the first steps", greater_than=0),
        ignored=(unless("lr_scheduler", "polynomial", "on this schedule"),),
    )
    # The optimizer, whose name is put into lower case, and its moments.
    optimizer: str = option(
        "AdamW",
        "AdamW, adamw8bit or prodigy, in upper or lower case (docs/guide.md says which for what).",
    )
    use_8bit_adam: bool = option(
        False,
        "The same as --optimizer adamw8bit.",
        ignored=(unless("optimizer", "adamw", "on another optimizer"),),
    )
    # Betas, epsilon and decay are those of diffusers' scripts.
    adam_beta1: float = option(0.9, "First beta.", range=SHARES)
    adam_beta2: float = option(0.999, "Second beta.", range=SHARES)
    adam_epsilon: float = option(
        1e-8,
        "Epsilon.",
        range=Range(1e3, "the optimizer would hardly move anything", greater_than=0),
    )
    adam_weight_decay: float = option(1e-4, "Weight decay of the adapters.", range=DECAYS)
    # Of Prodigy alone.
    prodigy_beta3: float | None = option(
        None,
        "Beta of Prodigy's step size estimate. Default: the square root of the second beta.",
        ignored=(ON_OTHERS,),
        range=SHARES,
    )
    prodigy_decouple: bool = option(
        True, "Decay weights separately from the gradient, as AdamW does.", ignored=(ON_OTHERS,)
    )
    prodigy_use_bias_correction: bool = option(
        True, "Correct Prodigy's averages for their start.", ignored=(ON_OTHERS,)
    )
    prodigy_safeguard_warmup: bool = option(
        True,
        "Keep the learning rate out of Prodigy's estimate while it warms up.",
        ignored=(ON_OTHERS,),
    )


@dataclass(frozen=True)
class OutputOptions:
    """The run folder, trackers and the hub."""

    section: ClassVar[str] = "output"
    may_change_on_resume: ClassVar[bool] = True

    # The run folder and its checkpoints.
    output_dir: str = option("lora-dreambooth-model", "Folder of the run.", is_path=True)
    overwrite_output_dir: bool = option(
        False,
        "Replace the run that the folder holds; with --resume_from_checkpoint step-100 only what it"
        " holds of later steps.",
    )
    # A method's name (`resolving.check_method`), or `NO_CONTROL`.
    compare: str = option(
        NO_CONTROL,
        "Train a control run after the run, with this method (such as lora) in place of --method,"
        " on the same data, noise and prompts, into OUTPUT_DIR-METHOD; none trains no control.",
    )
    checkpointing_steps: int = option(
        100,
        "Steps from one checkpoint to the next; Ctrl-C and SIGTERM save one, too.",
        range=STEPS,
    )
    checkpoints_total_limit: int | None = option(
        None,
        "Number of newest checkpoints to keep; 0 keeps all. Default: as many as fit into 2 GB, at"
        " least 2.",
        range=STEPS.or_zero,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue a run: auto (from its newest checkpoint, or from the start without one), or a"
        " checkpoint's name, such as step-100, or folder; latest must find a checkpoint.",
        is_path=True,
    )
    # Records in addition to losses.
    log_dynamics: bool = option(
        False,
        "Record how the adapters move, for python -m eval.dynamics (Figs. 2, A2, A4): the factors"
        " themselves, lora-sam's terms of Eq. 5, bilora's subspaces and ascent gain.",
    )
    dynamics_steps: int | None = option(
        None,
        "Steps from one such record to the next. Default: about 40 records in all.",
        range=STEPS,
        ignored=(unless("log_dynamics", True, "on a run that records none"),),
    )
    # Without training.
    dry_run: bool = option(
        False,
        "Only check the options, and print what would be trained and the memory that it takes. No"
        " weights of a model are read or downloaded, and nothing is written.",
    )
    # Trackers and the hub. Derived where TensorBoard is missing: `default_report_to`.
    logging_dir: str = option("logs", "Folder of the trackers' logs, within the run folder.")
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (used by default where it is installed), wandb, comet_ml, another"
        " that accelerate knows, all, or none.",
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
        "YAML file of options by their names here, or the name of one in recipes/, such as"
        " flux2_klein; options on the command line win.",
        is_path=True,
    )


def default_report_to(options: OutputOptions) -> str:
    """TensorBoard, the declared default, where it is installed; else none."""
    return options.report_to if machine.is_installed(options.report_to) else "none"
