"""Facts about this machine: packages, the device, the precision that a launcher chose."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from ..core.errors import UserError
from ..core.fields import TRUE


def is_installed(package: str) -> bool:
    """Test that a top-level package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, option: str) -> None:
    """Refuse an option, in the user's words, whose package, perhaps of a version, is missing."""
    if not is_installed(package.partition(">")[0]):
        raise UserError(f"{option} needs a package that is missing: run `pip install '{package}'`.")


def device_type() -> str:
    """The kind of device that accelerate will train on: cuda, mps, xpu, ... or cpu."""
    import torch

    if is_on("ACCELERATE_USE_CPU"):
        return "cpu"
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def processes() -> int:
    """Number of processes that train together, as accelerate finds it."""
    on_cpu = is_on("ACCELERATE_USE_CPU")
    mpi = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") if on_cpu else ()
    together = on_cpu or ("LOCAL_RANK" in os.environ and device_type() != "cpu")
    sizes = [os.environ[name] for name in (*mpi, "WORLD_SIZE") if name in os.environ]
    return int(sizes[0]) if sizes and together else 1


def is_on(variable: str) -> bool:
    """Test that a variable of accelerate's launcher says yes."""
    return os.environ.get(variable, "").lower() in TRUE


def launch() -> dict[str, Any]:
    """Facts of `refusals` about accelerate's launch, from its launcher's variables."""

    def word(name: str) -> str:
        return os.environ.get(name, "no").upper()

    compiled = word("ACCELERATE_DYNAMO_BACKEND") not in ("", "NO")
    engine, bad = "DDP", dict[str, bool]()
    if is_on("ACCELERATE_USE_FSDP"):
        engine = "FSDP on CPUs" if device_type() == "cpu" else "FSDP"
        if engine == "FSDP" and os.environ.get("FSDP_VERSION") == "2":
            names = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
            engine, bad = "FSDP2", {name: is_on(name) for name in names}
            bad |= {
                "FSDP_IGNORED_MODULES": "FSDP_IGNORED_MODULES" in os.environ,
                "SIZE_BASED_WRAP": word("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP",
                "ACCELERATE_DYNAMO_BACKEND": compiled,
            }
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        if is_on(f"ACCELERATE_USE_{name}"):
            engine = name
    if importlib.util.find_spec("torch_xla"):
        engine = "XLA"
    setting = next((name for name, given in bad.items() if given), None)
    alone = "LOCAL_RANK" not in os.environ
    return {"engine": engine, "fsdp_setting": setting, "compiled": compiled, "alone": alone}


def default_precision() -> str:
    """The precision given to accelerate launch, else the best that the device has.

    ``accelerate launch`` says "no" where nobody chose, so "no" counts as not given.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if given in ("fp16", "bf16"):
        return given
    if given != "no":
        raise UserError(
            f'accelerate is set to mixed precision "{given}", which training does not have:'
            " give --mixed_precision bf16, fp16 or no."
        )
    if device_type() != "cuda":
        return "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
