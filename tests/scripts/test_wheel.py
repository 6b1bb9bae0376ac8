"""The wheel, installed beside nothing of the repository: the command ``bilora`` and its demo."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.scripts.runs import ROOT, process

pytestmark = pytest.mark.slow
RUNNER = """
import os, runpy, sys
folder, *sys.argv = sys.argv[1:]
here = [p for p in sys.path if not os.path.exists(os.path.join(p, "train_dreambooth_bilora.py"))]
sys.path = [folder, *here]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    import bilora_diffusion
    assert bilora_diffusion.__file__.startswith(folder), bilora_diffusion.__file__
    assert not {"eval", "app", "examples"} & sys.modules.keys()
"""
"""Runs a script as if the repository, which the environment may name, were not there."""


def pip(*words):
    process("-m", "pip", *words, "--no-deps", "--no-index", "-q")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty folder into which the wheel was installed."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bilora_diffusion", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    pip("wheel", "--no-build-isolation", "-w", source, source)
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert sum(file.file_size for file in archive.infolist()) < 60e6
    pip("install", "--target", folder, wheel)
    return folder


def bilora(installed, folder, *words):
    """Exit code and output of the command, in an empty folder."""
    command = [sys.executable, "-c", RUNNER, installed, installed / "bin" / "bilora", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, run.stdout + run.stderr


def test_the_demo_trains_and_draws(installed, tmp_path):
    short = ("--max_train_steps", "4", "--validation_part", "1/32", "--num_validation_images", "0")
    code, out = bilora(installed, tmp_path, "demo", *short)
    assert code == 0, out
    assert "saw the same data and noise in all 4 steps" in out
    for row in ("base model: ", "LoRA, ordinary guidance 4", "Bi-LoRA, guidance 2 from base"):
        assert row in out
    assert "python -m eval" not in out  # which only the repository has
    assert (tmp_path / "demo" / "grid.png").stat().st_size > 10_000
    assert bilora(installed, tmp_path, "export", "demo/bilora")[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("train --config mini --dry_run", 0, "It fits"),
        ("--help", 0, "usage: bilora {train,text,export,demo}"),
        ("trian", 2, 'did you mean "train"'),
        ("export run --step last", 2, 'error: --step is "last"'),
        ("demo --seed x", 2, 'error: --seed is "x"'),
        ("train --config mini_flow", 2, "mini-flow is in the repository only"),
    ],
)
def test_a_command_answers(installed, tmp_path, words, code, expected):
    ended, out = bilora(installed, tmp_path, *words.split())
    assert ended == code
    assert expected in out
    assert not list(tmp_path.iterdir())
