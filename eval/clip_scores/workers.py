"""Images from several processes of one machine: each computes on one thread, see ``images``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence

from bilora_diffusion.run import provenance

from .images import Job, Store
from .settings import miniature

POLL_SECONDS = 1.0
LEAST = 32
"""Images for which another process is worth its start."""


def generate(store: Store, jobs: Sequence[Job], *, batch: int, count: int | None = None) -> int:
    """Make what is missing with ``count`` processes, this one included; returns how many images.

    What another process leaves undone, because it was killed or failed, is made here.

    Args:
        batch: see :meth:`Store.generate`.
        count: 1 or more; by default as many cores as are worth it for the miniature on a CPU, and
            otherwise 1, since another model may fill the memory by itself.
    """
    missing = store.missing(jobs)
    if not missing:
        return 0
    count = count or _worthwhile(store, len(missing))
    count = min(count, -(-len(missing) // batch))  # none without a part of its own
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(
            target=_share, args=(store, missing, batch, (rank, count), os.getpid()), daemon=True
        )
        for rank in range(1, count)
    ]
    for process in others:
        process.start()
    store.generate(missing, batch=batch, process=(0, count))
    for process in others:
        process.join()
    if others:
        store.generate(missing, batch=batch, progress=False)
    return len(missing)


def _worthwhile(store: Store, missing: int) -> int:
    if store.device != "cpu" or not miniature(store.sampling.base_model):
        return 1
    cores = provenance.device(store.device)["cpu_cores"]
    return max(1, min(int(cores or 1), missing // LEAST))


def _share(
    store: Store, jobs: Sequence[Job], batch: int, process: tuple[int, int], parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    store.generate(jobs, batch=batch, process=process)


def _end_with(parent: int) -> None:
    """End this process when the parent was killed: the same command may be started again."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
