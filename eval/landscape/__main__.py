"""``python -m eval.landscape``."""

import sys

from . import main

sys.exit(main())
