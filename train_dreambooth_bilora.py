"""Bi-LoRA and LoRA DreamBooth fine-tuning of Stable Diffusion XL and other image models.

    accelerate launch train_dreambooth_bilora.py --dataset linoyts/3d_icon
    accelerate launch train_dreambooth_bilora.py --dataset my_photos \\
        --instance_prompt "a photo of a TOK dog"
    python train_dreambooth_bilora.py --config recipes/mini.yaml --max_train_steps 20

The last command takes a minute on a CPU. ``--help`` explains every flag.
"""

from __future__ import annotations

import sys

from bilora_diffusion.commands import train as main

if __name__ == "__main__":
    sys.exit(main())
