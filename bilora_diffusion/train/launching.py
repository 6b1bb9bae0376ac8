"""Before a script's work: starting processes that its launcher was asked for and did not start, and
importing its libraries.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..config import machine
from ..core.errors import UserError

NOT_COMPILED = "TORCHDYNAMO_DISABLE"
"""torch's switch: where it is "1", `torch.compile` gives back what it is given."""


def start_missing_processes() -> None:
    """Start the CPU processes that ``accelerate launch --cpu --num_processes N`` was asked for.

    accelerate 1.15 sets a meeting point for N processes, but starts one only (without MPI's
    ``--mpirun_hostfile``), which would train on a smaller batch than was asked for. This process is
    then replaced by torchrun with N; where N can't be read off the launcher's command line, the
    launch is refused. Does nothing in any other case.

    Raises:
        UserError: several processes are expected, and how many is not known.
    """
    on_cpu = machine.is_on("ACCELERATE_USE_CPU")
    ranks = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if not on_cpu or "MASTER_ADDR" not in os.environ or any(r in os.environ for r in ranks):
        return
    count = launched_processes()
    if count is None:
        raise UserError(
            "accelerate launch --cpu starts one process whatever --num_processes says: launch"
            " several with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
            " train_dreambooth_bilora.py ..., or leave --num_processes out."
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.orig_argv[1:]])


def launched_processes() -> int | None:
    """N of the launcher's ``--num_processes N``; None where it does not say."""
    import psutil

    try:
        launcher = psutil.Process().parent()
        words = launcher.cmdline() if launcher else []
    except psutil.Error:
        return None
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        name, _, inside = flag.partition("=")
        if name in ("--num_processes", "--num-processes"):
            given = inside or value
            return int(given) if given.isdigit() and int(given) > 1 else None
    return None


@contextmanager
def importing() -> Iterator[None]:
    """Within the context libraries are imported without what costs time and is of no use here.

    Python looks for no garbage meanwhile, and later never among what is there at the end: torch and
    the libraries on it are objects by the hundred thousand that stay, and looking through them
    again and again takes a third of a short run. Nor is anything compiled that a library wants
    compiled as it is imported (bitsandbytes, which PEFT imports), for which torch would load its
    compiler. Does nothing where torch is imported already, as in a notebook.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    told = NOT_COMPILED in os.environ
    os.environ.setdefault(NOT_COMPILED, "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if not told:
            del os.environ[NOT_COMPILED]
