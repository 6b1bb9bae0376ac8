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
from bilora_diffusion.image.config import resolve
from bilora_diffusion.train.launching import importing, start_missing_processes


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0, or 2 after a sentence that says what to mend."""

    def train() -> None:
        start_missing_processes()
        with importing():
            config = resolve(argv)  # before all else, so that a typo is answered at once
            from bilora_diffusion.image.script import main as train_dreambooth

        train_dreambooth(argv, config)

    return run_cli(train)


if __name__ == "__main__":
    sys.exit(main())
