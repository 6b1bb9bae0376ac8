"""Bi-LoRA in TRL's SFTTrainer: instruction tuning of a causal language model.

    python examples/sft_bilora.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data trl-lib/Capybara --output_dir runs/capybara --learning_rate 5e-4 --max_steps 500

`--model` and `--data` are names on the hub, or a folder and a JSONL file whose rows have
"messages", "prompt" and "completion", or "text". Every argument of `SFTConfig` is a flag, such as
`--packing True`; `peft_config` is left out, as Bi-LoRA puts the adapters on. The output folder is a
plain LoRA adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.core.errors import run_cli
from bilora_diffusion.integrations import use_bilora


@dataclass
class Arguments:
    model: str
    data: str
    rank: int = 8
    alpha: float = 16
    rho: float = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    parser: Any = HfArgumentParser([Arguments, SFTConfig])  # pyright: ignore[reportArgumentType]
    words = None if argv is None else list(argv)
    options, args = parser.parse_args_into_dataclasses(words)
    file = {"path": "json", "data_files": options.data} if Path(options.data).is_file() else {}
    rows = load_dataset(**{"path": options.data, **file}, split="train")
    trainer = SFTTrainer(model=options.model, args=args, train_dataset=rows)
    use_bilora(trainer, BiLoRAConfig(rank=options.rank, alpha=options.alpha, rho=options.rho))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    sys.exit(run_cli(main))
