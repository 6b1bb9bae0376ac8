"""Properties of this machine and of the launch: packages, device, processes and precision."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from ..core.errors import UserError
from ..core.fields import TRUE

# Environment variables in which MPI implementations store the number of processes.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Engines of accelerate other than DDP and FSDP: suffixes of the ACCELERATE_USE_* variables that
# select them.
OTHER_ENGINES = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")


def is_installed(package: str) -> bool:
    """Return whether a top-level package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, option: str) -> None:
    """Check that the package for an option is installed.

    Args:
        package: name of the package. A minimum version, as in "peft>=0.21", is not checked; it is
            part of the install command.
        option: the option as the user gave it.

    Raises:
        UserError: the package is missing; the message has the install command.
    """
    if not is_installed(package.partition(">")[0]):
        raise UserError(f"{option} needs a package that is missing: run `pip install '{package}'`.")


def device_type() -> str:
    """Return the type of the device that accelerate will train on: cuda, mps, xpu, ... or cpu."""
    # Imported lazily, since the import takes a second and --help must not wait for it.
    import torch

    if is_on("ACCELERATE_USE_CPU"):
        return "cpu"
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def processes() -> int:
    """Return the number of processes that train together, as accelerate determines it."""
    is_on_cpu = is_on("ACCELERATE_USE_CPU")
    # accelerate creates a process group if LOCAL_RANK is set; if not, only for MPI on CPUs.
    if not is_on_cpu and ("LOCAL_RANK" not in os.environ or device_type() == "cpu"):
        return 1
    variables = ("WORLD_SIZE",)
    # accelerate reads MPI's variables only on CPUs.
    if is_on_cpu:
        variables = MPI_SIZES + variables
    for variable in variables:
        if variable in os.environ:
            return int(os.environ[variable])
    return 1


def refuse_separate_processes() -> None:
    """Raise UserError for several CPU processes that accelerate would not join into one run.

    accelerate 1.15 joins processes on CPUs only if the variable ACCELERATE_USE_CPU is true.
    ``accelerate launch --cpu --num_processes N`` sets this variable and the address at which N
    processes meet, but it starts only one of them unless MPI starts the others
    (``--mpirun_hostfile``).

    Raises:
        UserError: each process would train on its own, or fewer than requested would start.
    """
    # torchrun and accelerate set WORLD_SIZE; each MPI implementation sets its own variable.
    sizes = [os.environ[name] for name in ("WORLD_SIZE", *MPI_SIZES) if name in os.environ]
    has_several = any(size != "1" for size in sizes)
    uses_cpu = is_on("ACCELERATE_USE_CPU")
    if uses_cpu and not sizes and "MASTER_ADDR" in os.environ:
        launch = "accelerate launch --cpu starts one process whatever --num_processes says"
    elif not uses_cpu and has_several and device_type() == "cpu":
        launch = "on CPUs these processes would each train alone"
    else:
        return
    raise UserError(
        f"{launch}: start several with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        " SCRIPT ..., or one with accelerate launch --num_processes 1."
    )


def is_on(variable: str) -> bool:
    """Return whether an environment variable of accelerate's launcher is true."""
    return os.environ.get(variable, "").lower() in TRUE


def launch() -> dict[str, Any]:
    """Return the launch settings that `constraints` checks, from accelerate's variables."""
    # The launcher writes "NO" if no backend was chosen.
    is_compiled = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").upper() not in ("", "NO")
    engine = "DDP"
    fsdp_setting = None
    if is_on("ACCELERATE_USE_FSDP"):
        # On CPUs accelerate silently ignores FSDP: each process would train the whole model.
        engine = "FSDP on CPUs" if device_type() == "cpu" else "FSDP"
        if engine == "FSDP" and os.environ.get("FSDP_VERSION") == "2":
            engine = "FSDP2"
            fsdp_setting = _unsuited_fsdp_setting(is_compiled)
    # Each of these replaces DDP and FSDP.
    for name in OTHER_ENGINES:
        if is_on(f"ACCELERATE_USE_{name}"):
            engine = name
    # accelerate uses XLA whenever torch_xla is installed.
    if importlib.util.find_spec("torch_xla"):
        engine = "XLA"
    return {
        "engine": engine,
        "fsdp_setting": fsdp_setting,
        "compiled": is_compiled,
        "alone": "LOCAL_RANK" not in os.environ,
    }


def _unsuited_fsdp_setting(is_compiled: bool) -> str | None:
    """Return the first FSDP2 setting that is refused, or None.

    These settings shard, move or rename other layers too, such as trained ones.
    """
    is_set = {
        "FSDP_OFFLOAD_PARAMS": is_on("FSDP_OFFLOAD_PARAMS"),
        "FSDP_ACTIVATION_CHECKPOINTING": is_on("FSDP_ACTIVATION_CHECKPOINTING"),
        "FSDP_IGNORED_MODULES": "FSDP_IGNORED_MODULES" in os.environ,
        "SIZE_BASED_WRAP": os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP",
        "ACCELERATE_DYNAMO_BACKEND": is_compiled,
    }
    for name, value in is_set.items():
        if value:
            return name
    return None


def default_precision() -> str:
    """Return the precision given to accelerate launch, else the best one for the device.

    ``accelerate launch`` sets "no" by default, so "no" is treated as not given.

    Raises:
        UserError: the launcher is set to a precision that is not supported.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision in ("fp16", "bf16"):
        return precision
    if precision != "no":
        raise UserError(
            f'accelerate is set to mixed precision "{precision}", which is not supported:'
            " give --mixed_precision bf16, fp16 or no."
        )
    if device_type() != "cuda":
        return "no"
    import torch

    # GPUs before Ampere emulate bf16, which is slower than fp16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"
