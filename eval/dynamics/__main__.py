"""``python -m eval.dynamics``."""

import sys

from . import main

sys.exit(main())
