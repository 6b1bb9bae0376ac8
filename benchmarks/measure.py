"""Fair timing: rounds in which all that is compared runs once, rotating order, paired ratios."""

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

KIBI = 1024  # Linux tells resident memory in kibibytes

# Linux counts the memory of the process that starts another as that other's, until it is replaced:
# so a small one starts the run and says what the largest of its own children took.
_PEAK_MEMORY = """
import resource, subprocess, sys
ended = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended)
"""


def watched(words: Sequence[str]) -> list[str]:
    """The command that runs ``python WORDS``, whose output it sends to stderr, and then prints its
    highest resident memory in `KIBI` bytes.
    """
    return [sys.executable, "-c", _PEAK_MEMORY, sys.executable, *words]


class GPUMemory:
    """Context that samples how much memory of the GPU is taken beyond what was at its start.

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
        while not self._ended.wait(0.005):
            self.highest = max(self.highest, free_at_first - torch.cuda.mem_get_info()[0])


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the accelerator's queue included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def interleave(
    work: Sequence[Callable[[int], float]], *, rounds: int, warmup: int
) -> list[list[float]]:
    """Times of each work in each round, (len(work), rounds).

    Every round runs each work once, so that a slow phase of the machine meets all of them; the
    order rotates, so that none always comes first. Garbage is collected between rounds, never
    within a call.

    Args:
        work: each takes the number of the round (negative while warming up) and returns its time.
    """
    times: list[list[float]] = [[] for _ in work]
    gc.collect()
    gc.freeze()  # models need not be walked again
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            gc.collect()
            for turn in range(len(work)):
                index = (number + turn) % len(work)  # which comes first rotates
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
    # Of each round on its own: (rounds,)
    ratios = np.asarray(times) / np.asarray(baseline)
    if len(ratios) < 5:
        return float(np.median(ratios)), None
    interval = bootstrap(
        (ratios,), np.median, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(np.median(ratios)), (float(interval.low), float(interval.high))


def check(args: argparse.Namespace, *counts: str) -> None:
    """Refuse counts out of their range, and a file that could not be written in the end."""
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
