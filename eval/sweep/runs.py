"""Train the runs of a sweep in separate processes: if one run dies, the others continue.

If a sweep is killed, its runs may continue. Such a run holds the lock of its folder. A second sweep
can't start this run and counts it as failed; start the sweep again after this run has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from bilora_diffusion.core.durable import dump_json, write_text
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import without_paths
from bilora_diffusion.run import checkpoint, runlog

from .losses import FAILED, FINISHED, WAITING
from .plan import Run

SCHEMA_VERSION = 2
RECORD = "sweep.json"
LAUNCHER = "accelerate.commands.launch"
# Maximum time between SIGTERM and SIGKILL, in which a run writes a checkpoint
PATIENCE_SECONDS = 30.0
# Time between two checks of the running processes
POLL_SECONDS = 0.05
# Environment variables for PyTorch's number of threads and its visible GPUs
THREADS = "OMP_NUM_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"
# Prefix of a failed run's error message in its output
ERROR_MARK = "error: "
# Maximum length of the output's last line, in characters, if it is used as the error message
ERROR_LETTERS = 300


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run: finished, failed, or waiting."""

    # Name of the run's folder
    run: str
    variant: str
    seed: int
    status: str
    # Exit code of a failed run, negative for a signal; None for other runs
    exit_code: int | None = None
    # Error message of a failed run, without machine paths; None for other runs
    error: str | None = None


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run.

    The folder's name contains a hash of the options, so the options need no check. A run with a
    damaged record counts as unfinished; the training script then refuses the record.
    """
    try:
        return runlog.is_finished(folder)
    except UserError:
        return False


def describe_state(folder: Path) -> str:
    """Return a description of a run's state, such as "finished" or "resumes from step-100"."""
    if is_finished(folder):
        return "finished"
    newest = checkpoint.latest(folder)
    return "begins at step 0" if newest is None else f"resumes from {newest.name}"


@dataclass
class Runner:
    """Trains runs, and writes their outcomes to ``<runs_dir>/sweep.json``."""

    script: Path
    # ``--config`` of the script
    recipe: Path
    # Folder that contains the run folders; must exist
    runs_dir: Path
    # Number of runs at a time, which share the cores and the GPUs
    jobs: int = 1
    # Name of a run -> its outcome so far
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def command(self, run: Run) -> list[str]:
        """Return the command line that starts a run, or resumes it from its newest checkpoint."""
        folder = self.runs_dir / run.name
        command = [sys.executable, "-m", LAUNCHER]
        # By default, accelerate uses all GPUs, which would multiply the number of samples per step.
        command += ["--num_processes", "1"]
        command += [str(self.script), "--config", str(self.recipe)]
        command += [*run.flags, "--output_dir", str(folder)]
        return [*command, "--resume_from_checkpoint", "auto"]

    def run_all(self, runs: Sequence[Run]) -> list[Outcome]:
        """Train the runs that are not finished; a failed run does not stop the others.

        Returns:
            The outcomes of all runs, including those that were finished before.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the running processes have been stopped.
        """
        waiting: list[Run] = []
        for run in runs:
            status = FINISHED if is_finished(self.runs_dir / run.name) else WAITING
            if status == WAITING:
                waiting.append(run)
            self.outcomes[run.name] = Outcome(run.name, run.variant, run.seed, status)
        self._record()

        # Runs that were finished before do not count in the bar's speed.
        finished = len(runs) - len(waiting)
        bar = tqdm(total=len(runs), initial=finished, desc="runs", unit="run", smoothing=0)
        processes: list[RunProcess] = []
        with bar, _sigterm_as_interrupt():
            try:
                while waiting or processes:
                    # Start as many runs as allowed, then check which runs have ended.
                    while waiting and len(processes) < self.jobs:
                        used_slots = {process.slot for process in processes}
                        slot = min(set(range(self.jobs)) - used_slots)
                        processes.append(RunProcess(self, waiting.pop(0), slot))
                        bar.set_postfix_str(", ".join(p.run.name for p in processes))
                    for process in list(processes):
                        if process.is_running():
                            continue
                        processes.remove(process)
                        self._store(process.outcome(), bar)
                    time.sleep(POLL_SECONDS)
            finally:  # also after Ctrl-C
                _end([process.popen for process in processes])
        return list(self.outcomes.values())

    def _store(self, outcome: Outcome, bar: Any) -> None:
        self.outcomes[outcome.run] = outcome
        self._record()
        bar.update()
        if outcome.status == FAILED:
            bar.write(f"{outcome.run} failed: {outcome.error}", file=sys.stderr)

    def environment(self, slot: int) -> dict[str, str] | None:
        """Return the environment variables of a run; None for the environment of this process.

        Simultaneous runs share the cores, unless the user has set the number of threads. The GPUs
        that this process sees are assigned to the slots in turn.

        Args:
            slot: number of the run among the simultaneous runs, starting at 0.
        """
        if self.jobs == 1:
            return None
        environment = dict(os.environ)
        environment.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // self.jobs)))
        gpus = visible_gpus()
        if gpus:
            environment[GPUS] = gpus[slot % len(gpus)]
        return environment

    def _record(self) -> None:
        outcomes = [asdict(outcome) for outcome in self.outcomes.values()]
        record = {"schema_version": SCHEMA_VERSION, "runs": outcomes}
        write_text(self.runs_dir / RECORD, dump_json(record))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get(GPUS)
    if names is not None:
        return [name.strip() for name in names.split(",") if name.strip()]
    import torch  # imported here, so that --help does not wait for it

    return [str(number) for number in range(torch.cuda.device_count())]


class RunProcess:
    """A run in a separate process group, with its output in ``<folder>.log``."""

    def __init__(self, runner: Runner, run: Run, slot: int) -> None:
        self.run = run
        self.slot = slot
        self.folder = runner.runs_dir / run.name
        self.log = Path(f"{self.folder}.log")
        with self.log.open("ab") as log:
            if checkpoint.latest(self.folder) is None:
                log.truncate(0)
            # A resumed run appends to the log: its error comes after this position.
            self.log_start = log.seek(0, os.SEEK_END)
            self.popen = subprocess.Popen(
                runner.command(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a process group that can be stopped as a whole
                env=runner.environment(slot),
            )

    def is_running(self) -> bool:
        """Return whether the process is still running."""
        return self.popen.poll() is None

    def outcome(self) -> Outcome:
        """Return the outcome of a run whose process has ended."""
        run = self.run
        # The run's record decides, because the launcher may fail after the run has finished.
        if is_finished(self.folder):
            return Outcome(run.name, run.variant, run.seed, FINISHED)
        output = self.log.read_bytes()[self.log_start :].decode("utf-8", errors="replace")
        exit_code = self.popen.returncode
        error = last_sentence(output)
        return Outcome(run.name, run.variant, run.seed, FAILED, exit_code, error)


def last_sentence(output: str) -> str:
    """Return the last message after "error:" in a run's output, else the last line of the output.

    Absolute paths are shortened.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # The launcher's own traceback comes after the script's error message.
    sentences = [line for line in lines if ERROR_MARK in line]
    if sentences:
        sentence = sentences[-1].partition(ERROR_MARK)[2]
    elif lines:
        sentence = lines[-1][-ERROR_LETTERS:]
    else:
        sentence = "no output"
    return without_paths(sentence)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop processes and all their child processes, with SIGTERM and then with SIGKILL."""
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        launched: list[psutil.Process] = []
        for process in processes:
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                launched += psutil.Process(process.pid).children(recursive=True)
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
        # The launcher exits immediately. The training process first finishes its step and saves a
        # checkpoint.
        while any(map(_is_alive, launched)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    for process in processes:
        # The process group may still contain processes that outlived the launcher.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Context manager: SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    # Python's default handler of SIGINT raises KeyboardInterrupt.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
