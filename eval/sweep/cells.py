"""Running cells, some at a time, each in a process of its own, so that any of them may die.

A cell that outlived its sweep, which was killed, holds the lock of its run folder: started anew it
fails with a sentence, and the same command tries it again.
"""

from __future__ import annotations

import contextlib
import os
import re
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
from bilora_diffusion.run import checkpoint, runlog

from ..provenance import without_paths
from .grid import Cell
from .reporting import FINISHED

SCHEMA_VERSION = 1
RECORD = "sweep.json"
LAUNCHER = "accelerate.commands.launch"
PATIENCE_SECONDS = 30.0
"""Time between asking a run to end and killing it."""
PAUSE_SECONDS = 0.05
"""Between two looks at the running cells."""
THREADS = "OMP_NUM_THREADS"
_EXCEPTION = re.compile(r"(?:\[\w+\]: *)?[\w.]*(?:Error|Exception|Exit)\b.*")
_SENTENCE = re.compile(r"(?:.*\])?error: (.+)")  # also behind a progress bar that was cut short
_OF_LAUNCHER = ("subprocess.CalledProcessError", "torch.distributed.elastic")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Args:
        cell: name of the run folder.
        arm: label of its variant.
        seed: its seed.
        status: finished, failed, or waiting.
        exit_code: of a failed one; negative for a signal.
        error: last line of the output of a failed one, without machine paths.
    """

    cell: str
    arm: str
    seed: int
    status: str
    exit_code: int | None = None
    error: str | None = None


def state(folder: Path) -> str:
    """State of a run folder: finished, checkpoint (can be continued), begun, or new."""
    with contextlib.suppress(UserError):
        if runlog.read_run(folder)["status"] == FINISHED:
            return FINISHED
    if checkpoint.latest(folder) is not None:
        return "checkpoint"
    return "begun" if folder.exists() else "new"


@dataclass
class Runner:
    """Runs cells and keeps ``<runs_dir>/sweep.json``, the record of what became of each.

    Args:
        script: the training script.
        recipe: its ``--config``.
        runs_dir: folder of the run folders; must exist.
        jobs: cells at a time; several share the cores among them.
    """

    script: Path
    recipe: Path
    runs_dir: Path
    jobs: int = 1
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def command(self, cell: Cell) -> list[str]:
        """The command line that starts a cell, or continues it from its newest checkpoint."""
        folder = self.runs_dir / cell.name
        resume = state(folder) == "checkpoint"
        return [
            *(sys.executable, "-m", LAUNCHER, str(self.script)),
            *("--config", str(self.recipe), *cell.flags, "--output_dir", str(folder)),
            *(("--resume_from_checkpoint", "auto") if resume else ("--overwrite_output_dir",)),
        ]

    def run_all(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Run what is not finished; a cell that fails does not keep the others from running.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the running cells have been ended.
        """
        done = {c.name for c in cells if state(self.runs_dir / c.name) == FINISHED}
        for cell in cells:
            status = FINISHED if cell.name in done else "waiting"
            self.outcomes[cell.name] = Outcome(cell.name, cell.variant, cell.seed, status)
        self._record()
        # Cells that were there already took no time, and say nothing about how long one takes.
        bar = tqdm(total=len(cells), initial=len(done), desc="cells", unit="cell", smoothing=0)
        waiting = [cell for cell in cells if cell.name not in done]
        running: list[_Run] = []
        with bar, _sigterm_as_interrupt():
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        running.append(_Run(self, waiting.pop(0)))
                        bar.set_postfix_str(", ".join(run.cell.name for run in running))
                    for run in [run for run in running if run.process.poll() is not None]:
                        running.remove(run)
                        self._keep(run.outcome(), bar)
                    time.sleep(PAUSE_SECONDS)
            finally:
                _end([run.process for run in running])
        return list(self.outcomes.values())

    def _keep(self, outcome: Outcome, bar: Any) -> None:
        self.outcomes[outcome.cell] = outcome
        self._record()
        bar.update()
        if outcome.status == "failed":
            bar.write(f"{outcome.cell} failed: {outcome.error}", file=sys.stderr)

    def environment(self) -> dict[str, str] | None:
        """Environment of each run; several at a time share the cores, unless the user says how."""
        if self.jobs == 1 or THREADS in os.environ:
            return None
        return {**os.environ, THREADS: str(max(1, (os.cpu_count() or 1) // self.jobs))}

    def _record(self) -> None:
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "cells": [asdict(outcome) for outcome in self.outcomes.values()],
        }
        write_text(self.runs_dir / RECORD, dump_json(record))


def explain(code: int, output: str) -> tuple[int, str]:
    """The exit code of the training process, and one line why it failed.

    Args:
        code: the launcher's exit code.
        output: of the run. A single process of accelerate launch ends with the launcher's own
            traceback, which is passed over but for the script's exit code, which it names.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if lines and lines[-1].startswith(_OF_LAUNCHER[0]):
        status = re.search(r"non-zero exit status (\d+)", lines[-1])
        if killed := re.search(r"died with <Signals\.(\w+): (\d+)>", lines[-1]):
            return -int(killed[2]), f"killed by {killed[1]}"
        code = int(status[1]) if status else code
        tracebacks = [n for n, line in enumerate(lines) if line.startswith("Traceback")]
        lines = lines[: tracebacks[-1] if tracebacks else -1]
    own = [line for line in lines if not line.startswith(_OF_LAUNCHER)]
    errors = [match[1] for line in own if (match := _SENTENCE.fullmatch(line))]
    raised = [line for line in own if _EXCEPTION.fullmatch(line)]
    if not errors and not raised and code < 0:
        return code, f"killed by signal {-code}"
    return code, without_paths((errors or raised or own or ["no output"])[-1])


class _Run:
    """A cell that runs, in a process group of its own, with its output in ``<folder>.log``."""

    def __init__(self, runner: Runner, cell: Cell) -> None:
        self.cell, self.folder = cell, runner.runs_dir / cell.name
        with open(f"{self.folder}.log", "ab") as log:
            if state(self.folder) != "checkpoint":
                log.truncate(0)
            self.began = log.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                runner.command(cell),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=runner.environment(),
            )

    def outcome(self) -> Outcome:
        """Its outcome, however it ended."""
        cell = self.cell
        if state(self.folder) == FINISHED:
            return Outcome(cell.name, cell.variant, cell.seed, FINISHED)
        output = Path(f"{self.folder}.log").read_bytes()[self.began :]
        code, error = explain(self.process.returncode, output.decode("utf-8", errors="replace"))
        return Outcome(cell.name, cell.variant, cell.seed, "failed", code, error)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes with all that they started: asked first, killed where that does not help."""
    gone = (ProcessLookupError, psutil.Error)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        launched: list[psutil.Process] = []
        for process in processes:
            with contextlib.suppress(*gone):
                launched += psutil.Process(process.pid).children(recursive=True)
                os.killpg(process.pid, signal.SIGTERM)
        patience = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.wait(max(0.0, patience - time.monotonic()))
        # The launcher ends at once, what it launched after a step and a checkpoint.
        while any(map(_alive, launched)) and time.monotonic() < patience:
            time.sleep(PAUSE_SECONDS)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # also what the launcher has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within the context SIGTERM ends the sweep as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
