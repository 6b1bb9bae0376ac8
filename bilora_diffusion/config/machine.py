"""What this machine has: packages, the device, the precision that a launcher chose."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..fields import TRUE


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, option: str, least: str = "") -> None:
    """Refuse an option whose package is missing.

    Args:
        option: it and its value, as the user wrote them.
        least: the version that it needs, such as ">=0.50".

    Raises:
        UserError: it says how to install it.
    """
    if not is_installed(package):
        name = f'"{package}{least}"' if least else package
        raise UserError(f"{option} needs a package that is missing: run `pip install {name}`.")


def require_compiler(option: str) -> None:
    """Refuse an option that compiles where PyTorch's inductor would find no compiler.

    It takes a C++ compiler for the CPU; on CUDA Triton, which takes a C compiler; both take
    Python's headers.

    Raises:
        UserError: it names what is missing and how to install it.
    """
    if device_type() == "cuda":
        require("triton", option)
        kind, package, names = "C", "gcc", (os.environ.get("CC") or "gcc", "clang")
    else:
        usual = "clang++" if sys.platform == "darwin" else "g++"
        kind, package, names = "C++", "g++", (os.environ.get("CXX") or usual,)
    if not any(map(shutil.which, names)):
        raise UserError(
            f"{option} needs a {kind} compiler, and there is no {names[0]} here: run"
            f" `apt-get install {package}` or what your system has instead, or leave it out."
        )
    if not has_headers():
        raise UserError(
            f"{option} needs Python's headers, and there is no Python.h here: run"
            " `apt-get install python3-dev` or what your system has instead, or leave it out."
        )


def has_headers() -> bool:
    """Whether this Python has what extensions written in C include."""
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def device_type() -> str:
    """The kind of device that accelerate will train on: cuda, mps, xpu, ... or cpu."""
    import torch

    if is_on("ACCELERATE_USE_CPU"):
        return "cpu"
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def processes() -> int:
    """How many processes train together, as accelerate finds it."""
    on_cpu = is_on("ACCELERATE_USE_CPU")
    mpi = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") if on_cpu else ()
    together = on_cpu or ("LOCAL_RANK" in os.environ and device_type() != "cpu")
    sizes = [os.environ[name] for name in (*mpi, "WORLD_SIZE") if name in os.environ]
    return int(sizes[0]) if sizes and together else 1


def is_on(variable: str) -> bool:
    """Test that a variable of accelerate's launcher says yes."""
    return os.environ.get(variable, "").lower() in TRUE


def launch() -> dict[str, Any]:
    """How accelerate was launched, as facts of `refusals`: from the variables that its launcher
    sets and it reads.
    """

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
    """What accelerate launch was told, else the best that the device has.

    ``accelerate launch`` says "no" where nobody chose, so "no" counts as not told.

    Raises:
        UserError: it was told a precision that training does not have.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told in ("fp16", "bf16"):
        return told
    if told != "no":
        raise UserError(
            f'accelerate is set to mixed precision "{told}", which training does not have:'
            " give --mixed_precision bf16, fp16 or no."
        )
    if device_type() != "cuda":
        return "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
