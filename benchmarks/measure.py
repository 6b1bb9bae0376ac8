"""Fair timing: rounds in which all that is compared runs once, rotating order, paired ratios."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch.utils._python_dispatch import TorchDispatchMode

from bilora_diffusion.run import provenance

MIN_FOR_INTERVAL = 5
KIBI = 1024  # Linux tells resident memory in kibibytes

# Linux counts the memory of the process that starts another as that other's, until it is replaced:
# so a small one starts the run and says what the largest of its own children took.
_TAKES = """
import resource, subprocess, sys
ended = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended)
"""


def watched(words: Sequence[str]) -> list[str]:
    """The command that runs ``python WORDS``, whose output it sends to stderr, and then prints its
    highest resident memory in `KIBI` bytes.
    """
    return [sys.executable, "-c", _TAKES, sys.executable, *words]


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the accelerator's queue included."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
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
                index = (number + turn) % len(work)
                taken = work[index](number)
                if number >= 0:
                    times[index].append(taken)
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
    ratios = np.asarray(times) / np.asarray(baseline)
    if len(ratios) < MIN_FOR_INTERVAL:
        return float(np.median(ratios)), None
    interval = bootstrap(
        (ratios,), np.median, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(np.median(ratios)), (float(interval.low), float(interval.high))


def median_seconds(work: Callable[[], Any], device: torch.device, *, calls: int = 30) -> float:
    """Median wall time of ``calls`` calls, after three that are not counted."""
    for _ in range(3):
        work()
    return statistics.median(seconds(work, device) for _ in range(calls))


class Operations(TorchDispatchMode):
    """Counts the operations that are run within the context: kernels on an accelerator, but for
    those that only look at memory in another way.

    Attributes:
        count: of all.
        waits: how many of them ask for a value, for which an accelerator's queue is waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        asks = func is torch.ops.aten._local_scalar_dense.default
        self.waits += asks
        looks = func.is_view or func in _LOOKS or func.namespace != "aten"
        self.count += not (asks or looks)
        return func(*args, **(kwargs or {}))


_LOOKS = {torch.ops.aten.detach.default, torch.ops.aten.promote_types.default}


def circumstances(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""
    commit, changed = provenance.commit()
    about = {"device": provenance.device(device), "versions": provenance.versions()}
    return {**about, "commit": commit, "commit_differs": changed}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
