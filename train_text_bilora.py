"""Bi-LoRA and LoRA fine-tuning of T5, causal language models and text classifiers.

    accelerate launch train_text_bilora.py --config recipes/t5_base/mrpc.yaml
    accelerate launch train_text_bilora.py --model_name_or_path meta-llama/Llama-3.1-8B \\
        --train_file answers.jsonl --mixed_precision bf16 --gradient_checkpointing
    python train_text_bilora.py --config recipes/rotten_tomatoes.yaml --max_train_steps 20

The last one runs on a CPU in a minute. ``--help`` explains every flag.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bilora_diffusion.errors import run_cli
from bilora_diffusion.text.config import resolve_text
from bilora_diffusion.train.launching import importing, start_missing_processes


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0, or 2 after a sentence that says what to mend."""

    def train() -> None:
        start_missing_processes()
        with importing():
            config = resolve_text(argv)  # before all else, so that a typo is answered at once
            from bilora_diffusion.text.script import main as train_text

        train_text(argv, config)

    return run_cli(train)


if __name__ == "__main__":
    sys.exit(main())
