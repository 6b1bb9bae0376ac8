"""Runs that are killed, interrupted or out of disk, and those of two processes, end as one."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import Any

import pytest

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.image import script
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.run import checkpoint, runlog, snapshots
from bilora_diffusion.run.record import BY_CONCEPT
from tests.scripts import runs
from tests.text.text_builders import material, text_flags, train_text_once

STEPS = 18
QUIET: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def steps_logged(folder):
    file = folder / runlog.METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def until(ready, process, patience=600.0):
    """Wait for something of a process that goes on."""
    end = time.monotonic() + patience
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_change_no_bit(tmp_path):
    """One before there is a checkpoint or after, as it comes, and one soon after it went on."""
    whole, folder = runs.train_once(max_train_steps=STEPS), tmp_path / "killed"
    given = {"max_train_steps": STEPS, "checkpointing_steps": 2, "resume_from_checkpoint": "auto"}
    argv, chance = runs.flags(folder, **given), random.Random(0)
    for least in (3, 7):
        process = runs.started(runs.SCRIPT, *argv, **QUIET)
        until(lambda least=least: steps_logged(folder) >= least, process)
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.wait()
    assert checkpoint.latest(folder) is not None
    assert runs.started(runs.SCRIPT, *argv, **QUIET).wait(timeout=600) == 0
    assert len(runlog.read_run(folder)["resumed"]) >= 1
    runs.alike(whole, folder, "auxiliary_norm")


def interrupt_and_go_on(command, folder, number):
    """Start a run as in a terminal, send it a signal after three steps, and run the command that it
    prints, which is returned.
    """
    process = runs.started(
        *(*command, "--overwrite_output_dir"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a process group of its own, which Ctrl-C reaches as a whole
    )
    until(lambda: steps_logged(folder) >= 3, process)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=600)[1]
    launched = "accelerate.commands.launch" in command  # ends as it likes
    assert launched or process.returncode == 128 + number, said
    patience = time.monotonic() + 600  # a launcher may end before what it launched
    while runlog.read_run(folder)["status"] == "running" and time.monotonic() < patience:
        time.sleep(0.1)
    assert runlog.read_run(folder)["status"] == "interrupted", said
    (printed,) = [line for line in said.splitlines() if "--resume_from_checkpoint latest" in line]
    subprocess.run(printed, shell=True, cwd=runs.ROOT, check=True, capture_output=True)
    return printed


@pytest.mark.slow
def test_the_printed_command_ends_as_the_whole_run(tmp_path):
    shared = {**material("causal"), "max_train_steps": 300}
    whole, folder = train_text_once("causal", **shared), tmp_path / "it's interrupted"
    command = [runs.TEXT_SCRIPT, *text_flags(folder, **shared)]
    interrupt_and_go_on(command, folder, signal.SIGTERM)
    runs.alike(whole, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_agree_with_one_and_go_on_exactly(tmp_path):
    """Of two concepts, with a record of the perturbations, and the best step by held-out loss."""
    concepts = [runs.two_icons(tmp_path / name) for name in ("icons", "again")]
    model = {concept.pop("pretrained_model_name_or_path") for concept in concepts}.pop()
    concepts[1]["repeats"] = 2
    (tmp_path / "concepts.yaml").write_text(json.dumps(concepts, default=str))
    shared = {
        **{"dataset": tmp_path / "concepts.yaml", "validation_dataset": None},
        **{"pretrained_model_name_or_path": model, "validation_loss_steps": 2, "keep_best": True},
        **{"max_train_steps": 8, "train_batch_size": 1, "learning_rate": 2e-4},
        **{"method": "lora-sam", "log_dynamics": True, "dynamics_steps": 1, "optimizer": "AdamW"},
    }
    one = runs.train(tmp_path / "one", **shared, gradient_accumulation_steps=4)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    two, parts = tmp_path / "two", tmp_path / "parts"
    lines = [
        [*launch, str(runs.SCRIPT), *runs.flags(folder, **shared, gradient_accumulation_steps=2)]
        for folder in (two, parts)
    ]
    runs.process(*lines[0])
    assert runs.column(one, "step") == runs.column(two, "step")
    assert runs.column(one, "digest") == runs.column(two, "digest")
    parts_of_loss = {key for key in runlog.read_metrics(one)[0] if key.startswith(BY_CONCEPT)}
    assert len(parts_of_loss) == 2
    for key in ("loss", "heldout_loss", *parts_of_loss):
        assert runs.column(one, key) == pytest.approx(runs.column(two, key), abs=1e-5)
    assert runs.difference(one, two) < 1e-5
    best = [runlog.read_run(folder)["results"]["best_step"] for folder in (one, two)]
    assert best[0] == best[1]
    assert list(snapshots.steps(one)) == list(snapshots.steps(two))
    for a, b in zip(runs.column(one, "dynamics"), runs.column(two, "dynamics"), strict=True):
        assert a == {
            k: v if v is None else pytest.approx(v, rel=1e-2, abs=1e-7) for k, v in b.items()
        }
    assert "accelerate" in interrupt_and_go_on(lines[1], parts, signal.SIGINT)
    runs.alike(two, parts)


SHORT = {
    **{"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 1},
    **{"validation_prompt": "a TOK icon", "num_validation_images": 1},
    **{"log_dynamics": True, "dynamics_steps": 1},
}
WRITERS: list[tuple[Any, str, int, int]] = [
    (runlog.RunLog, "metric", 3, 2),
    (snapshots, "write", 2, 2),
    (DreamBooth, "validate", 1, 2),
    (checkpoint, "save", 1, 2),
    (script, "save_diffusers", 1, 4),
]
"""Who writes, the call of his at which the disk is full, and the step of the last checkpoint."""


@pytest.fixture
def disk(tmp_path):
    """A real disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("making a small disk needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


@contextmanager
def full_at(disk, owner, writer, call):
    """Fills the disk right before that call of a writer."""
    write, calls = getattr(owner, writer), []

    def after_filling(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            fill(disk)
        return write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, writer, after_filling)
        yield
    (disk / "filler").unlink()


@pytest.mark.slow
def test_a_run_goes_on_whenever_there_is_room_again(tmp_path, disk):
    whole, folder = runs.train(tmp_path / "whole", **SHORT), disk / "run"
    resume: dict[str, Any] = {}
    for owner, writer, call, kept in WRITERS:
        full = pytest.raises(TrainingError, match=rf"{folder} is full \(0 bytes.* make about ")
        with full_at(disk, owner, writer, call), full:
            runs.train(folder, **SHORT, **resume)
        assert runlog.read_run(folder)["status"] == "failed"
        assert checkpoint.steps(folder)[-1] == kept
        assert checkpoint.load(folder / "checkpoints" / f"step-{kept}").step == kept
        resume = {"resume_from_checkpoint": "latest"}
    runs.train(folder, **SHORT, **resume)
    assert runlog.read_run(folder)["status"] == "finished"
    assert runs.difference(whole, folder) == 0
    assert not list(folder.rglob(".*"))
