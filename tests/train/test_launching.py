"""launching: what a script does before its work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.scripts.runs import ROOT

FREEING = """
import gc, os, sys
from bilora_diffusion.train.launching import importing
before = dict(os.environ)
with importing():
    assert not gc.isenabled()
    import decimal
assert gc.isenabled()
assert gc.get_freeze_count() > 0
assert os.environ == before
gc.unfreeze()
sys.modules["torch"] = sys  # as in a notebook, whose models are to be freed
with importing():
    assert gc.isenabled()
assert gc.get_freeze_count() == 0
"""
LIGHT = """
import sys
from bilora_diffusion.train.launching import importing
with importing():
    from train_dreambooth_bilora import parse
    parse(["--dataset", "mini"])
    import bilora_diffusion.image.script
    others = {"datasets", "pandas", "matplotlib", "gradio", "open_clip", "lm_eval"}
    assert not others & sys.modules.keys()
    import bilora_diffusion.text.script
assert not {"networkx", "torch._inductor.compile_fx"} & sys.modules.keys()
import torch
graphs = []
double = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(graph) or graph)
assert double(torch.ones(())) == 2
assert len(graphs) == 1
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(FREEING, id="garbage is not looked for among what a script imports"),
        pytest.param(
            LIGHT,
            id="no more is imported than runs, torch's compiler when asked",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_of_its_own(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
