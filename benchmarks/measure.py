"""Fair timing: each round runs every candidate once, in rotating order; ratios are paired."""

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

# A process that is started has at first the memory of its parent, which Linux counts as its own
# peak. So a small process starts the run and prints the peak of its largest child.
_PEAK_MEMORY = """
import resource, subprocess, sys
ended = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended)
"""


def watch_command(words: Sequence[str]) -> list[str]:
    """A command that runs ``python WORDS`` and prints its peak resident memory in `KIBI` bytes.

    The output of ``python WORDS`` goes to stderr.
    """
    return [sys.executable, "-c", _PEAK_MEMORY, sys.executable, *words]


class GPUMemory:
    """Context that measures the peak of a GPU's memory beyond that at its start.

    The memory of all processes counts, so nobody else may use the GPU.

    Attributes:
        highest: in bytes.
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
    """Wall time of one call, with the work that it leaves in the GPU's queue."""
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
    """Times of each candidate in each round, (candidates, rounds).

    Every round runs each candidate once, so that a slow phase of the machine meets all of them; the
    order rotates, so that none is always first. Garbage is collected between rounds, never within
    a call.

    Args:
        work: one function for each candidate. It gets the number of the round, which is negative
            while warming up, and returns its time.
    """
    times: list[list[float]] = [[] for _ in work]
    gc.collect()
    gc.freeze()  # models need not be walked again
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
    """Median of time / baseline over rounds, and its 95 % bootstrap interval.

    The interval is None below five rounds.
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
    """Refuse counts out of their range, and a ``--json`` that could not be written in the end."""
    for name in counts:
        STEPS.check(f"--{name}", getattr(args, name))
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json is {args.json}; name a file in a folder that exists.")


def finish(result: Any, table: Callable[[Any], str], file: Path | None) -> None:
    """Print the table of a result, and write the result to the file where there is one."""
    print(table(result))
    if file is not None:
        write_text(file, json.dumps(result, indent=2) + "\n")


def circumstances(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit of a measurement."""
    commit, changed = provenance.commit()
    return {
        "device": provenance.device(device),
        "versions": provenance.versions(),
        "commit": commit,
        "commit_differs": changed,
    }
