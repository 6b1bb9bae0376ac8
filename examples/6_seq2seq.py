"""Bi-LoRA in Transformers' Seq2SeqTrainer: T5 learns to generate one column from another.

    python examples/6_seq2seq.py --model google-t5/t5-base --data knkarthick/samsum \\
        --source dialogue --target summary --prefix "summarize: " --output_dir runs/samsum \\
        --learning_rate 5e-4 --num_train_epochs 3 --predict_with_generate True

`--model` is a hub id or a folder, and `--data` is a hub id, a folder or a JSONL file. Evaluation
and generation use the primary adapter alone. The output folder contains this adapter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.core.files import require_column
from bilora_diffusion.integrations import scripts, use_bilora

EXAMPLE = (
    "python examples/6_seq2seq.py --model google-t5/t5-small --data rows.jsonl --output_dir runs/a"
)


@dataclass
class Arguments:
    # The alias is train_text_bilora.py's flag, which error messages about the model mention.
    model: str = field(metadata={"aliases": ["--model_name_or_path"]})
    data: str
    source: str = "input"
    target: str = "target"
    prefix: str = ""
    max_length: int = 256
    held_out: int = 100
    rank: int = 8
    alpha: float = 16
    rho: float = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    options, args = scripts.parse(Arguments, Seq2SeqTrainingArguments, argv, EXAMPLE)
    rows = scripts.load_rows(options.data)
    require_column(options.source, rows.column_names, "--source", options.data)
    require_column(options.target, rows.column_names, "--target", options.data)
    if options.held_out >= len(rows):
        raise UserError(
            f"--held_out {options.held_out} leaves no row for training, since the data has only"
            f" {len(rows)} rows: lower it."
        )
    model, tokenizer = scripts.load_model(options.model, "seq2seq")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(
            [options.prefix + text for text in batch[options.source]],
            text_target=batch[options.target],
            truncation=True,
            max_length=options.max_length,
        )

    rows = rows.map(encode, batched=True, remove_columns=rows.column_names)
    parts: Any = rows.train_test_split(test_size=options.held_out, seed=args.seed)

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    use_bilora(trainer, BiLoRAConfig(rank=options.rank, alpha=options.alpha, rho=options.rho))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()

    result: Any = trainer.predict(parts["test"])
    print(f"held-out loss {result.metrics['test_loss']:.4f}")
    if args.predict_with_generate:
        tokens = result.predictions.clip(min=0)  # padding is -100
        lines = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        json_lines = [json.dumps({"prediction": line}) + "\n" for line in lines]
        file = Path(args.output_dir) / "predictions.jsonl"
        file.write_text("".join(json_lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_cli(main))
