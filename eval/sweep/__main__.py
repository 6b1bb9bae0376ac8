"""``python -m eval.sweep``."""

import sys

from . import main

sys.exit(main())
