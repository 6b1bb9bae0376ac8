"""Runs that are killed, interrupted or out of disk space end like an uninterrupted run."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

from bilora_diffusion.core.errors import Interrupted, TrainingError
from bilora_diffusion.run import checkpoint, runlog, snapshots
from bilora_diffusion.run.record import BY_CONCEPT
from bilora_diffusion.train.trainer import Trainer
from tests.scripts.runs import (
    ON_CPUS,
    ROOT,
    SCRIPT,
    TEXT_SCRIPT,
    TORCHRUN,
    assert_same_run,
    column,
    difference,
    flags,
    started,
    train,
    train_once,
    two_icons,
)
from tests.text.text_builders import material, text_flags, train_text_once


def steps_logged(folder):
    file = folder / runlog.METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(ready, process, patience=600.0):
    """Wait up to ``patience`` seconds until ``ready()`` is true; fail if the process has ended."""
    end = time.monotonic() + patience
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path):
    complete = train_once(max_train_steps=12)
    folder = tmp_path / "killed"
    values = {"max_train_steps": 12, "checkpointing_steps": 2, "resume_from_checkpoint": "auto"}
    process = started(
        SCRIPT,
        *flags(folder, **values),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: steps_logged(folder) >= 3, process)
    process.kill()
    process.wait()
    assert checkpoint.latest(folder) is not None
    train(folder, **values)
    assert len(runlog.read_run(folder)["resumed"]) == 1
    assert_same_run(complete, folder, "auxiliary_norm")


def interrupt_and_resume(script, argv, folder, number, processes=1, **environment):
    """Start a run as in a terminal, signal it after three steps, and run the command it prints."""
    launcher = [*TORCHRUN, processes] if processes > 1 else []
    process = started(
        *launcher,
        script,
        *argv,
        "--overwrite_output_dir",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a new process group, which gets the signal as from Ctrl-C
        environment=environment,
    )
    wait_until(lambda: steps_logged(folder) >= 3, process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=600)[1]
    if processes == 1:  # a launcher has its own exit codes
        assert process.returncode == 128 + number, output
    end = time.monotonic() + 60  # a launcher may end before its processes
    while runlog.read_run(folder)["status"] == "running" and time.monotonic() < end:
        time.sleep(0.1)
    assert runlog.read_run(folder)["status"] == "interrupted", output
    (line,) = [line for line in output.splitlines() if "--resume_from_checkpoint auto" in line]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_the_printed_command_completes_the_run_exactly(tmp_path):
    shared = {**material("causal"), "max_train_steps": 300}
    complete = train_text_once("causal", **shared)
    folder = tmp_path / "it's interrupted"  # a name that needs quotes in a shell
    argv = text_flags(folder, **shared)
    interrupt_and_resume(TEXT_SCRIPT, argv, folder, signal.SIGTERM)
    assert_same_run(complete, folder)


@pytest.mark.slow
def test_samples_that_an_interruption_leaves_out_are_generated_on_resume(tmp_path, monkeypatch):
    sampling = {"validation_prompt": "a TOK icon", "num_validation_images": 1}
    sampling |= {"validation_epochs": 1, "validation_num_inference_steps": 2}
    values = {**two_icons(tmp_path / "icons"), **sampling, "max_train_steps": 3}
    values |= {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "skip_final_inference": True,
    }
    complete = train(tmp_path / "complete", **values)
    take_step = Trainer.train_step

    def take_step_and_signal(trainer, batches):
        metrics = take_step(trainer, batches)
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", take_step_and_signal)
        with pytest.raises(Interrupted):
            train(folder, **values)
    assert checkpoint.steps(folder)[-1] == 2
    samples = sorted(complete.glob("validation/step-*/*.png"))
    assert [file.parent.name for file in samples] == ["step-1", "step-2"]
    assert not (folder / "validation" / "step-2").exists()
    train(folder, **values, resume_from_checkpoint="auto")
    for file in samples:
        assert (folder / file.relative_to(complete)).read_bytes() == file.read_bytes()


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_an_interrupted_run_of_two_processes_ends_like_a_run_of_one(tmp_path):
    """The run has two concepts, records its dynamics, and keeps its best step."""
    concepts = []
    for name, repeats in (("icons", 1), ("more", 2)):
        concept = two_icons(tmp_path / name)
        del concept["pretrained_model_name_or_path"]  # an option of the run, not of a concept
        concepts.append({**concept, "repeats": repeats})
    (tmp_path / "concepts.yaml").write_text(json.dumps(concepts, default=str))
    shared = {
        "dataset": tmp_path / "concepts.yaml",
        "validation_dataset": None,
        "pretrained_model_name_or_path": "mini",
        "validation_loss_steps": 2,
        "keep_best": True,
        "max_train_steps": 8,
        "train_batch_size": 1,
        "learning_rate": 2e-4,
        "hold_unconditional": 4,
        "hold_unconditional_every": 4,
        "method": "lora-sam",
        "log_dynamics": True,
        "dynamics_steps": 1,
        "optimizer": "AdamW",
    }
    single = train(tmp_path / "one", **shared, gradient_accumulation_steps=4)
    double = tmp_path / "two"
    argv = flags(double, **shared, gradient_accumulation_steps=2)
    interrupt_and_resume(SCRIPT, argv, double, signal.SIGINT, processes=2, **ON_CPUS)
    for key in ("step", "digest"):
        assert column(single, key) == column(double, key)
    first_row = runlog.read_metrics(single)[0]
    losses_by_concept = [key for key in first_row if key.startswith(BY_CONCEPT)]
    assert len(losses_by_concept) == 2
    # Two processes add up gradients in another order, so values differ by rounding.
    for key in ("loss", "heldout_loss", *losses_by_concept):
        assert column(single, key) == pytest.approx(column(double, key), abs=1e-5)
    assert difference(single, double) < 1e-5
    single_results = runlog.read_run(single)["results"]
    assert single_results["best_step"] == runlog.read_run(double)["results"]["best_step"]
    assert list(snapshots.steps(single)) == list(snapshots.steps(double))
    single_dynamics = column(single, "dynamics")
    double_dynamics = column(double, "dynamics")
    for expected, values in zip(single_dynamics, double_dynamics, strict=True):
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            # An undefined value is None.
            close = value if value is None else pytest.approx(value, rel=1e-2, abs=1e-7)
            assert values[key] == close, key


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of 24 MB, and yield its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs permission")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@pytest.mark.slow
def test_a_run_resumes_when_there_is_disk_space_again(tmp_path, disk, monkeypatch):
    values = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 1}
    complete = train(tmp_path / "complete", **values)
    folder = disk / "run"
    save = checkpoint.save
    saved_steps = []

    def save_on_a_full_disk(run, state):
        saved_steps.append(state.step)
        if state.step == 4:
            fill(disk)
        return save(run, state)

    monkeypatch.setattr(checkpoint, "save", save_on_a_full_disk)
    with pytest.raises(TrainingError, match=f"{folder} is full: free some space and resume"):
        train(folder, **values)
    assert saved_steps == [2, 4]
    assert checkpoint.load(folder / "checkpoints" / "step-2").step == 2
    assert checkpoint.steps(folder) == [2]
    (disk / "filler").unlink()
    monkeypatch.undo()
    train(folder, **values, resume_from_checkpoint="latest")
    assert runlog.read_run(folder)["status"] == "finished"
    assert difference(complete, folder) == 0
    assert not list(folder.rglob(".*"))  # no temporary file is left
