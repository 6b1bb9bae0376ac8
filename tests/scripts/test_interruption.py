"""Runs that are killed or interrupted, and those shared by two processes, end as one whole run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.export import main as export
from bilora_diffusion.run import checkpoint, lock, runlog, snapshots
from tests.scripts.runs import (
    ROOT,
    SCRIPT,
    TEXT_SCRIPT,
    TORCHRUN,
    column,
    difference,
    flags,
    process,
    train,
    train_once,
)
from tests.text.text_builders import material, text_flags, train_text_once

STEPS, KILLS = 30, 3


def steps_logged(folder: Path) -> int:
    file = folder / runlog.METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def start(argv: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_at_random(argv: list[str], folder: Path, chance: random.Random) -> bool:
    """Kill the run some steps (or none) after it went on; True if it was still running."""
    began = steps_logged(folder)
    process = start(argv)
    ahead, patience = chance.randint(0, 9), time.monotonic() + 600
    while ahead and process.poll() is None and time.monotonic() < patience:
        # A resumed run first drops the lines after its checkpoint, so the count may fall.
        began = min(began, steps_logged(folder))
        if steps_logged(folder) >= began + ahead:
            break
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.4))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_change_no_bit(tmp_path: Path) -> None:
    whole = train_once(max_train_steps=STEPS)
    folder = tmp_path / "killed"
    argv = flags(
        folder, max_train_steps=STEPS, checkpointing_steps=2, resume_from_checkpoint="auto"
    )
    chance = random.Random(0)
    kills = sum(kill_at_random(argv, folder, chance) for _ in range(KILLS))
    assert kills == KILLS
    assert checkpoint.latest(folder) is not None
    last = start(argv)
    assert last.wait(timeout=600) == 0
    assert len(runlog.read_run(folder)["resumed"]) >= KILLS // 2
    assert difference(whole, folder) == 0
    for key in ("step", "loss", "digest", "auxiliary_norm"):
        assert column(whole, key) == column(folder, key)


def interrupt(command: list[str], folder: Path, number: signal.Signals, ahead: int) -> str:
    """Start a run as in a terminal, send it a signal after some steps; what it says at its end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, which Ctrl-C reaches as a whole
    )
    patience = time.monotonic() + 600
    while steps_logged(folder) < ahead and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, number)
    said = process.communicate(timeout=600)[1]
    launched = "accelerate.commands.launch" in command  # ends as it likes
    assert launched or process.returncode == 128 + number, said
    while runlog.read_run(folder)["status"] == "running" and time.monotonic() < patience:
        time.sleep(0.1)  # a launcher may end before what it launched
    assert runlog.read_run(folder)["status"] == "interrupted", said
    assert checkpoint.latest(folder) is not None
    return said


LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "number"),
    [("image", signal.SIGTERM), ("text", signal.SIGINT), ("processes", signal.SIGINT)],
)
def test_the_printed_command_ends_as_the_whole_run(
    kind: str, number: signal.Signals, tmp_path: Path
) -> None:
    chance, folder = random.Random(f"{kind} {number}"), tmp_path / "it's interrupted"
    if kind == "text":
        shared = {**material("causal"), "max_train_steps": 300}
        script, argv, whole = TEXT_SCRIPT, text_flags, train_text_once("causal", **shared)
    else:
        shared = {"max_train_steps": 12, "train_batch_size": 1, "gradient_accumulation_steps": 2}
        script, argv, whole = SCRIPT, flags, tmp_path / "whole"
    start = [sys.executable, *(LAUNCH if kind == "processes" else []), str(script)]
    if kind == "image":
        whole = train_once(**shared)
    elif kind == "processes":
        subprocess.run([*start, *argv(whole, **shared)], cwd=ROOT, check=True, capture_output=True)
    command = [*start, *argv(folder, **shared), "--overwrite_output_dir"]
    said = interrupt(command, folder, number, chance.randint(1, shared["max_train_steps"] // 2))
    (printed,) = [line for line in said.splitlines() if "--resume_from_checkpoint latest" in line]
    assert ("accelerate" in printed) == (kind == "processes")
    subprocess.run(printed, shell=True, cwd=ROOT, check=True, capture_output=True)
    assert difference(whole, folder) == 0
    for key in ("step", "loss", "digest"):
        assert column(whole, key) == column(folder, key)


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    """The first stands still meanwhile, as one does that takes long steps."""
    folder = tmp_path / "run"
    given = {"max_train_steps": 8, "checkpointing_steps": 1, "train_batch_size": 1}
    running = start(flags(folder, **given))
    patience = time.monotonic() + 600
    while checkpoint.latest(folder) is None and time.monotonic() < patience:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGSTOP)
    try:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for second in (
            {},
            {"overwrite_output_dir": True},
            {"resume_from_checkpoint": "auto"},
            {"fit": True, "overwrite_output_dir": True},
        ):
            with pytest.raises(UserError, match=f"{running.pid} .*{folder}"):
                train(folder, **{**given, **second})
        assert export([str(folder), "--step", "1"]) == 2
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    finally:
        running.kill()
        running.wait()
    train(folder, **given, resume_from_checkpoint="auto")
    assert runlog.read_run(folder)["status"] == "finished"
    assert not list(folder.rglob(lock.FILE))


GA = {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}
RECORDED = {"log_dynamics": True, "dynamics_steps": 1, "optimizer": "AdamW"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "values"),
    [
        (LAUNCH, {"method": "lora-sam", **RECORDED}),
        ((*TORCHRUN, 2), {"method": "bilora", "auxiliaries": "sample", "optimizer": "AdamW"}),
        pytest.param((*TORCHRUN, 2), {"method": "bilora", **RECORDED}, marks=pytest.mark.matrix),
        pytest.param((*TORCHRUN, 2), GA, marks=pytest.mark.matrix),
    ],
)
def test_two_processes_agree_with_one(
    tmp_path: Path, launcher: Sequence[object], values: dict[str, Any]
) -> None:
    shared = {"max_train_steps": 3, "train_batch_size": 1, "learning_rate": 2e-4, **values}
    one, two = train(tmp_path / "one", **shared, gradient_accumulation_steps=4), tmp_path / "two"
    argv = flags(two, **shared, gradient_accumulation_steps=2)
    said = process(*launcher, SCRIPT, *argv, ACCELERATE_USE_CPU="true")
    assert said.returncode == 0, said.stderr
    assert column(two, "step") == [1, 2, 3]
    assert column(one, "digest") == column(two, "digest")
    assert column(one, "loss") == pytest.approx(column(two, "loss"), abs=1e-5)
    assert difference(one, two) < 1e-5
    assert list(snapshots.steps(one)) == list(snapshots.steps(two))
    for a, b in zip(column(one, "dynamics"), column(two, "dynamics"), strict=True):
        assert a == {
            k: v if v is None else pytest.approx(v, rel=1e-2, abs=1e-7) for k, v in b.items()
        }
