"""Before a script's work: refusing processes that would not train together, and importing the
libraries.
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
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_separate_processes() -> None:
    """Refuse several processes on CPUs that accelerate does not join to one run.

    accelerate 1.15 joins processes on CPUs only where its variable ACCELERATE_USE_CPU says so.
    ``accelerate launch --cpu --num_processes N`` sets it, and a meeting point for N processes, but
    starts one of them only, unless MPI starts them (``--mpirun_hostfile``).

    Raises:
        UserError: the processes would train each on its own, or fewer than were asked for.
    """
    # torchrun and accelerate set WORLD_SIZE, and each MPI a variable of its own.
    sizes = [os.environ[name] for name in ("WORLD_SIZE", *MPI_SIZES) if name in os.environ]
    has_several = any(size != "1" for size in sizes)
    uses_cpu = machine.is_on("ACCELERATE_USE_CPU")
    if uses_cpu and not sizes and "MASTER_ADDR" in os.environ:
        launch = "accelerate launch --cpu starts one process whatever --num_processes says"
    elif not uses_cpu and has_several and machine.device_type() == "cpu":
        launch = "on CPUs these processes would each train alone"
    else:
        return
    raise UserError(
        f"{launch}: start several with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        " SCRIPT ..., or one with accelerate launch --num_processes 1."
    )


@contextmanager
def importing() -> Iterator[None]:
    """Within the context libraries are imported faster.

    Garbage collection is off, and later skips the objects of these imports: torch and the libraries
    on it make hundreds of thousands that stay, and looking through them takes a third of a short
    run. Nothing is compiled at import (bitsandbytes asks for it, and PEFT imports that), since
    torch would load its compiler for it. Does nothing if torch is imported already, as in a
    notebook.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    was_set = NOT_COMPILED in os.environ
    os.environ.setdefault(NOT_COMPILED, "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # A run with --compile needs the compiler after the imports.
        if not was_set:
            del os.environ[NOT_COMPILED]
