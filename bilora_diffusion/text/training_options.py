"""The text path's own defaults (Tables A4-A7) and spellings of the options of training."""

from dataclasses import dataclass, field

from ..choices import ALL_LINEAR
from ..config.fields import option
from ..config.training import LR_SCHEDULERS, AdapterOptions, OptimizerOptions, StepOptions


@dataclass(frozen=True)
class TextAdapterOptions(AdapterOptions):
    """The adapters and the method that trains them."""

    rank: int = option(8, "Rank r of the LoRA matrices.", aliases=["--lora_r"])
    lora_alpha: float | None = option(
        None, "Alpha; the adapter's output is scaled by alpha/r. Default: twice the rank (16)."
    )
    rho: float | None = option(
        None,
        "Radius: of the ball that the auxiliary stays in (bilora, Eq. 8), of the step uphill"
        " (lora-sam, Eq. 4), of the noise (flat-lora). Default: 0.05, 0.01 and 0.05.",
    )
    target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={
            "help": "Layers that get adapters, by their names or the endings of these; all-linear"
            " is every linear layer but the output head.",
            "aliases": ["--lora_target_modules"],
        },
    )


@dataclass(frozen=True)
class TextStepOptions(StepOptions):
    """Steps and precision."""

    train_batch_size: int = option(
        8,
        "Rows of one forward pass on one device.",
        aliases=["--per_device_train_batch_size"],
    )
    gradient_accumulation_steps: int = option(1, "Forward passes of one optimizer step.")
    max_train_steps: int | None = option(
        None, "Optimizer steps in all; else --num_train_epochs counts.", aliases=["--max_steps"]
    )
    num_train_epochs: int | None = option(
        None, "Passes over the data. Default: 3, unless --max_train_steps is given."
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice to save memory.")


@dataclass(frozen=True)
class TextOptimizerOptions(OptimizerOptions):
    """Optimizer and learning rates."""

    learning_rate: float = option(5e-4, "Learning rate; 1.0 by default for prodigy.")
    lr_scheduler: str = option(
        "cosine",
        "Course of the learning rate.",
        choices=LR_SCHEDULERS,
        aliases=["--lr_scheduler_type"],
    )
    warmup_ratio: float | None = option(
        None, "Share of the steps in which it rises from 0. Default: 0.03; 0 for constant."
    )
    lr_warmup_steps: int | None = option(
        None, "Steps in which it rises, instead of a share.", aliases=["--warmup_steps"]
    )
    adam_weight_decay: float = option(
        0.0, "Weight decay of the adapters.", aliases=["--weight_decay"]
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Loss and metrics on held-out rows; always of the primary alone."""

    _argument_group_name = "evaluation"

    eval_batch_size: int = option(
        16, "Held-out rows of one forward pass.", aliases=["--per_device_eval_batch_size"]
    )
    validation_loss_steps: int = option(
        0,
        "Measure the held-out loss every so many steps; 0: at the start and the end only.",
        aliases=["--eval_steps"],
    )
    eval_train_samples: int = option(
        0, "Measure the loss on so many training rows too, for python -m eval.generalization."
    )
    validation_epochs: int | None = option(
        None,
        "Let the model answer the held-out rows every so many epochs. Default: at the end only.",
    )
    eval_on_start: bool = option(False, "Let the untrained model answer them, too.")
    max_predictions: int | None = option(
        None, "Let it answer only so many held-out rows; 0 for none. Default: all."
    )
    generation_max_new_tokens: int | None = option(
        None,
        "Tokens of a generated answer. Default: --max_target_length for seq2seq models, 256 for"
        " causal ones.",
        aliases=["--max_new_tokens"],
    )
