"""Options of how any model is trained: adapters, method, steps, precision, optimizer, schedule."""

from dataclasses import dataclass

from ..choices import AUXILIARY_UPDATES, BALLS, DIRECTIONS, INITS, RHO_NORMS, SCHEDULES
from .fields import automatic_switch, option

PRECISIONS = ("no", "fp16", "bf16")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


@dataclass(frozen=True)
class AdapterOptions:
    """The adapters and the method that trains them."""

    _argument_group_name = "adapters and method"

    method: str = option(
        "bilora",
        "bilora (two adapters, flat minima; Algorithm 1), lora (one adapter), lora-sam (SAM on the"
        " adapter; Eqs. 3-5), lora-obar or lora-nbar (BAR, Li et al. 2024a), flat-lora (Li et al."
        " 2024b) or full (all weights). Runs that differ only here see the same data and noise, so"
        " the options of the other methods may stand.",
    )
    rank: int = option(4, "Rank r of the LoRA matrices.")
    lora_alpha: float | None = option(
        None, "Alpha; the adapter's output is scaled by alpha/r. Default: twice the rank (8)."
    )
    lora_dropout: float = option(0.0, "Dropout in front of the adapters, in [0, 1).")
    init_lora_weights: str = option(
        "default",
        "How the primary starts: default (A kaiming-uniform, B zero; the paper, PEFT), gaussian (A"
        " normal, as in diffusers' script), pissa (top singular vectors of W; Meng et al. 2024) or"
        " lora-ga (of the loss's gradient; Wang et al. 2024). The last two change the base weights;"
        " the exported file makes up for it.",
        choices=INITS,
    )
    lora_ga_samples: int = option(
        128, "Samples whose mean gradient lora-ga starts from (Wang et al. 2024)."
    )
    use_dora: bool = option(
        False, "Train the primary as a DoRA: magnitude and direction apart (Liu et al. 2024)."
    )
    quantize: str = option(
        "none",
        "Hold the frozen weights of the trained models in 4 bits: nf4 with double quantization"
        " (QLoRA, Dettmers et al. 2023). Needs bitsandbytes.",
        choices=("none", "nf4"),
    )
    use_ema: bool = option(
        False,
        "Average the primary over training (Izmailov et al. 2018); validation and the exported"
        " file then take the average.",
    )
    ema_decay: float = option(
        0.99, "Decay of that average, in [0, 1); it averages over about 1 / (1 - decay) steps."
    )
    rho: float | None = option(
        None,
        "Radius: of the ball that the auxiliary stays in (bilora, Eq. 8), of the step uphill"
        " (lora-sam, Eq. 4), of the noise (flat-lora). Default: 0.05 for the first two, 0.1 for the"
        " last.",
    )
    rho_norm: str = option(
        "scaled",
        "bilora: norm that rho bounds: of the weight change with its scale alpha/r, or of the bare"
        " product BA (Eq. 10 to the letter).",
        choices=RHO_NORMS,
    )
    rho_schedule: str = option(
        "constant",
        "bilora: rho constant (the paper), or rising from 0 over the run, as flat-lora's noise.",
        choices=SCHEDULES,
    )
    ball: str = option(
        "global",
        "bilora, ablation of Eq. 10: clip the norm over all layers, of each layer to its share rho"
        " / sqrt(layers), or nothing.",
        choices=BALLS,
    )
    auxiliary_rank: int | None = option(
        None, "bilora: rank r2 of the auxiliary (Section 5.7). Default: the primary's."
    )
    auxiliary_alpha: float | None = option(
        None, "bilora: alpha of the auxiliary. Default: the primary's."
    )
    auxiliary_learning_rate: float | None = option(
        None, "bilora: eta_2 of Eq. 9. Default: the primary's (Appendix G)."
    )
    auxiliary_direction: str = option(
        "ascent",
        "bilora, ablation of Eq. 9: let the auxiliary climb, or descend like a second primary.",
        choices=DIRECTIONS,
    )
    auxiliary_update: str = option(
        "optimizer",
        "bilora: move the auxiliary by the optimizer (Eq. 9), or by power iteration to the best"
        " direction of its rank, which needs no optimizer state (Golub & Van Loan, Section 8.2.4).",
        choices=AUXILIARY_UPDATES,
    )
    rescale_moments: bool = option(
        False,
        "bilora: shrink Adam's moments of the auxiliary at each projection, as its factors. The"
        " paper does not.",
    )
    bar_alpha: float = option(
        0.25, "lora-obar, lora-nbar: strength of the balancing (Appendix H.4)."
    )
    bar_schedule: str = option(
        "constant",
        "lora-obar, lora-nbar: strength constant, or falling to 0 (Li et al. 2024a).",
        choices=SCHEDULES,
    )


@dataclass(frozen=True)
class StepOptions:
    """Steps and precision."""

    _argument_group_name = "steps and precision"

    seed: int = option(0, "Seed of everything random: data, noise, adapters, images.")
    train_batch_size: int = option(
        1,
        "Images of one forward pass on one device; 1 too where only"
        " --gradient_accumulation_steps is given.",
    )
    gradient_accumulation_steps: int = option(
        4, "Forward passes of one optimizer step; 1 where only --train_batch_size is given."
    )
    max_train_steps: int | None = option(
        None, "Optimizer steps in all. Default: 500, unless --num_train_epochs is given."
    )
    num_train_epochs: int | None = option(
        None,
        "Passes over the images, or over the class images where these are more; not beside"
        " --max_train_steps.",
    )
    max_grad_norm: float = option(1.0, "Norm that the gradients are clipped to.")
    mixed_precision: str | None = option(
        None,
        "Precision of the frozen weights and of the arithmetic. Default: what accelerate launch"
        " was told (fp16 or bf16); else bf16 on a GPU that has it, fp16 on one that has not, and"
        " no elsewhere.",
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool | None = automatic_switch(
        "Compute activations twice to save memory. Default: on for CUDA from 512 pixels on."
    )
    allow_tf32: bool = option(False, "Let CUDA multiply fp32 matrices in TF32.")
    local_rank: int = option(
        -1, "Set by old launchers; accelerate and torchrun say it by the variable LOCAL_RANK."
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning rates."""

    _argument_group_name = "optimizer"

    learning_rate: float = option(2e-4, "Learning rate; 1.0 by default for prodigy.")
    scale_lr: bool = option(
        False,
        "Multiply --learning_rate, and --auxiliary_learning_rate where it is given, by batch size,"
        " accumulation and processes; --text_encoder_lr stays.",
    )
    lr_scheduler: str = option("constant", "Course of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(0, "Steps in which it rises from 0; not for constant.")
    lr_num_cycles: int = option(1, "Cycles of cosine_with_restarts.")
    lr_power: float = option(1.0, "Power of polynomial.")
    optimizer: str = option("AdamW", "AdamW or prodigy, in upper or lower case.")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit state, from bitsandbytes.")
    adam_beta1: float = option(0.9, "First beta of AdamW and Prodigy.")
    adam_beta2: float = option(0.999, "Second beta of AdamW and Prodigy.")
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW and Prodigy.")
    adam_weight_decay: float = option(1e-4, "Weight decay of the adapters.")
    prodigy_beta3: float | None = option(
        None, "Beta of Prodigy's step size estimate. Default: the square root of the second beta."
    )
    prodigy_decouple: bool = option(True, "Decay weights apart from the gradient, as AdamW does.")
    prodigy_use_bias_correction: bool = option(True, "Correct Prodigy's averages for their start.")
    prodigy_safeguard_warmup: bool = option(
        True, "Keep the learning rate out of Prodigy's estimate while it warms up."
    )
