"""Bi-LoRA and LoRA fine-tuning of T5, causal language models and text classifiers.

    accelerate launch train_text_bilora.py --config recipes/t5_base/mrpc.yaml
    accelerate launch train_text_bilora.py --model_name_or_path meta-llama/Llama-3.1-8B \\
        --train_file answers.jsonl --mixed_precision bf16 --gradient_checkpointing
    python train_text_bilora.py --config recipes/rotten_tomatoes.yaml --max_train_steps 20

The last command takes a minute on a CPU. ``--help`` explains every flag.
"""

from __future__ import annotations

import sys

from bilora_diffusion.commands import text as main

if __name__ == "__main__":
    sys.exit(main())
