"""Paired timing: each round runs every candidate once, in rotating order."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy.stats import bootstrap

from bilora_diffusion.core.durable import write_text
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.values import STEPS
from bilora_diffusion.run import provenance

KIBI = 1024  # Linux reports resident memory in kibibytes

# A child's peak on Linux includes its parent's memory at the time of the fork. So a small process
# starts the run and prints the peak of its largest child, in kibibytes.
_PEAK_MEMORY = """
import resource, subprocess, sys
ended = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended)
"""


def watch_command(words: Sequence[str]) -> list[str]:
    """Return a command that runs ``python WORDS`` and prints its peak resident memory (KiB).

    The output of ``python WORDS`` goes to stderr.
    """
    return [sys.executable, "-c", _PEAK_MEMORY, sys.executable, *words]


class GPUMemory:
    """Context manager that measures how far a GPU's used memory rises above its level at entry.

    The memory of all processes counts, so no other process may use the GPU.

    Attributes:
        highest: Largest rise so far, in bytes.
    """

    highest = 0

    def __enter__(self) -> Self:
        free, _ = torch.cuda.mem_get_info()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(free,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self, free_at_first: int) -> None:
        while not self._ended.wait(0.005):  # seconds between two samples
            free, _ = torch.cuda.mem_get_info()
            self.highest = max(self.highest, free_at_first - free)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Measure the wall time of one call in seconds, including work that it queues on the GPU."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleave(
    work: Sequence[Callable[[int], float]], *, rounds: int, warmup: int
) -> list[list[float]]:
    """Run every candidate once per round and return their times, (candidates, rounds).

    A slow phase of the machine thus affects all candidates, and the rotating order means that none
    is always first. Garbage is collected between rounds, never within a call.

    Args:
        work: One function per candidate. It gets the number of the round, which is negative during
            warm-up, and returns its time.
        rounds: Number of rounds that are returned.
        warmup: Number of rounds before them whose times are discarded.
    """
    times: list[list[float]] = [[] for _ in work]
    gc.collect()
    gc.freeze()  # later collections skip the models
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            gc.collect()
            for turn in range(len(work)):
                index = (number + turn) % len(work)  # rotates with the round
                duration = work[index](number)
                if number >= 0:
                    times[index].append(duration)
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def paired_ratio(
    times: Sequence[float], baseline: Sequence[float]
) -> tuple[float, tuple[float, float] | None]:
    """Compute the median of time / baseline over rounds, and its 95 % bootstrap interval.

    The interval is None for fewer than five rounds.
    """
    ratios = np.asarray(times) / np.asarray(baseline)  # (rounds,)
    # A bootstrap of fewer values gives intervals that are far too narrow.
    if len(ratios) < 5:
        return float(np.median(ratios)), None
    interval = bootstrap(
        (ratios,), np.median, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(np.median(ratios)), (float(interval.low), float(interval.high))


def check(args: argparse.Namespace, *counts: str) -> None:
    """Raise UserError if a count is out of range or ``--json`` could not be written at the end."""
    for name in counts:
        STEPS.check(f"--{name}", getattr(args, name))
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json is {args.json}; name a file in a folder that exists.")


def finish(result: Any, table: Callable[[Any], str], file: Path | None) -> None:
    """Print the table of a result, and write the result to ``file`` if one is given."""
    print(table(result))
    if file is not None:
        write_text(file, json.dumps(result, indent=2) + "\n")


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return the device, package versions and commit of a measurement."""
    commit, changed = provenance.commit()
    return {
        "device": provenance.device(device),
        "versions": provenance.versions(),
        "commit": commit,
        "commit_differs": changed,
    }
