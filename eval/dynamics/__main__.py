"""``python -m eval.dynamics``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
