"""launching: what a script does before its work."""

import subprocess
import sys

import pytest

from tests.scripts.runs import ROOT

LIGHT = """
import gc, sys
from bilora_diffusion.train.launching import importing
with importing():
    from bilora_diffusion.image.config import resolve
    resolve(["--dataset", "mini"])
    import bilora_diffusion.image.script
    others = {"datasets", "pandas", "matplotlib", "gradio", "open_clip", "lm_eval"}
    assert not others & sys.modules.keys()
    import bilora_diffusion.text.script
assert gc.isenabled()
assert not {"networkx", "torch._inductor.compile_fx"} & sys.modules.keys()
import torch
graphs = []
double = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(graph) or graph)
assert double(torch.ones(())) == 2
assert len(graphs) == 1
"""


@pytest.mark.slow
def test_no_more_is_imported_than_runs_and_torchs_compiler_when_asked():
    subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, check=True)
