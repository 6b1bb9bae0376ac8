"""``python -m eval.tune``."""

import sys

from . import main

sys.exit(main())
