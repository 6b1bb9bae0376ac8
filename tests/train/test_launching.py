"""launching: what a script does before its work."""

from __future__ import annotations

import subprocess
import sys

from tests.scripts.runs import ROOT

OWN_PROCESS = """
import gc, sys
from bilora_diffusion.train.launching import importing
with importing():
    assert not gc.isenabled()
    import decimal
assert gc.isenabled()
assert gc.get_freeze_count() > 0
gc.unfreeze()
sys.modules["torch"] = sys  # as in a notebook, whose models are to be freed
with importing():
    assert gc.isenabled()
assert gc.get_freeze_count() == 0
"""


def test_garbage_is_not_looked_for_among_what_a_script_imports() -> None:
    subprocess.run([sys.executable, "-c", OWN_PROCESS], cwd=ROOT, check=True)
