"""Entry point of `python -m bilora_diffusion`, which is the command `bilora`."""

from __future__ import annotations

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
