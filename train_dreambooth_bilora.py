"""Bi-LoRA and LoRA DreamBooth fine-tuning of Stable Diffusion XL.

    accelerate launch train_dreambooth_bilora.py --dataset linoyts/3d_icon
    accelerate launch train_dreambooth_bilora.py --dataset my_photos \\
        --instance_prompt "a photo of a TOK dog"
    python train_dreambooth_bilora.py --config recipes/mini.yaml --max_train_steps 20

The last one runs on a CPU in a minute. ``--help`` explains every flag.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bilora_diffusion.errors import run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0, or 2 after a sentence that says what to mend."""

    def train() -> None:
        from bilora_diffusion.stepping import start_missing_processes

        start_missing_processes()
        from bilora_diffusion.train import main as train_dreambooth

        train_dreambooth(argv)

    return run_cli(train)


if __name__ == "__main__":
    sys.exit(main())
