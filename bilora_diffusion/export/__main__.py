"""`python -m bilora_diffusion.export FILE` prints what is inside a LoRA file."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
