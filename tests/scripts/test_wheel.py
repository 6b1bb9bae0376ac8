"""The installed wheel, without the repository: the command ``bilora`` and its demo."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.scripts.runs import ROOT, run_python

pytestmark = pytest.mark.slow
RUNNER = """
import contextlib, io, json, os, runpy, sys
folder, script, *commands = sys.argv[1:]
here = [p for p in sys.path if not os.path.exists(os.path.join(p, "train_dreambooth_bilora.py"))]
sys.path = [folder, *here]
answers = []
for words in map(json.loads, commands):
    sys.argv = [script, *words]
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    answers.append((code, output.getvalue()))
import bilora_diffusion
assert bilora_diffusion.__file__.startswith(folder), bilora_diffusion.__file__
assert not {"eval", "app", "examples"} & sys.modules.keys()
print(json.dumps(answers))
"""
"""Program that runs commands in one process and prints the exit code and output of each.

It removes the repository from ``sys.path``, where the environment may have put it.
"""


def pip(command):
    run_python(f"-m pip {command} --no-deps --no-index -q".split())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel, install it into an empty folder, and return the folder."""
    source = tmp_path_factory.mktemp("source")
    folder = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bilora_diffusion", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    pip(f"wheel --no-build-isolation -w {source} {source}")
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert sum(file.file_size for file in archive.infolist()) < 60e6
    pip(f"install --target {folder} {wheel}")
    return folder


def answers(installed, folder, commands):
    """Run each command line in a folder, and return its exit code and output."""
    runner = [sys.executable, "-c", RUNNER, str(installed), str(installed / "bin" / "bilora")]
    runner += [json.dumps(command.split()) for command in commands]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(runner, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr + process.stdout, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.matrix  # over a minute; tests/docs/test_walk.py runs the demo from the checkout
def test_the_demo_trains_and_samples(installed, tmp_path):
    demo = "demo --max_train_steps 4 --max_eval_samples 4 --num_validation_images 0"
    demo_answer, export_answer = answers(installed, tmp_path, [demo, "export demo/bilora"])
    exit_code, output = demo_answer
    assert exit_code == 0, output
    assert "saw the same data and noise in all 4 steps" in output
    for row in ("base model, ", "LoRA, ordinary guidance 4", "Bi-LoRA, guidance 2 from base"):
        assert row in output
    assert "python -m eval" not in output  # eval is only in the repository
    assert (tmp_path / "demo" / "grid.png").stat().st_size > 10_000
    assert export_answer[0] == 0


COMMANDS = {
    "train --config mini --dry_run": (0, "It fits"),
    "--help": (0, "usage: bilora {caption,train,text,export,demo}"),
    "trian": (2, 'did you mean "train"'),
    "export run --step last": (2, 'error: --step is "last"'),
    "demo --seed x": (2, 'error: --seed is "x"'),
    "train --config mini_flow": (2, "mini-flow is only in the repository"),
}


def test_each_command_has_its_exit_code_and_output(installed, tmp_path):
    for line, (exit_code, output) in zip(
        COMMANDS, answers(installed, tmp_path, COMMANDS), strict=True
    ):
        expected_code, part = COMMANDS[line]
        assert exit_code == expected_code, line
        assert part in output, line
    assert not list(tmp_path.iterdir())
