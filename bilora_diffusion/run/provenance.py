"""Origin of a result: versions, commit, machine, memory."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, `PACKAGES` and ``packages``; None for a missing package."""
    installed: dict[str, str | None] = dict.fromkeys((*PACKAGES, *packages))
    for name in installed:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    # This package may be a checkout without metadata.
    toolkit = sys.modules["bilora_diffusion"].__version__
    return {"python": platform.python_version(), **installed, "bilora_diffusion": toolkit}


def commit(package: Path | None = None) -> tuple[str | None, bool | None]:
    """Return the commit of a package's checkout, and whether the package differs from it.

    Args:
        package: folder of a package; None for this package.

    Returns:
        Both are None outside a checkout, without git, or if the checkout belongs to another
        project, for example if the package is installed in that project's virtual environment.
    """
    package = package or Path(__file__).resolve().parents[1]
    # If git tracks a file of the package, the checkout belongs to the package.
    head = None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        head = _git(package, "rev-parse", "--verify", "HEAD")
    if head is None:
        return None, None
    # Only files of the package count; runs and results next to it do not.
    changes = _git(package, "status", "--porcelain", "--", ".")
    if changes is None:
        return head, None
    return head, bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command in a folder; None if it fails."""
    # A git command that runs a hook sets these variables to its own repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        process = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if process.returncode != 0:
        return None
    return process.stdout.strip()


def device(training_device: torch.device | str | None = None) -> dict[str, str | int | None]:
    """Return a description of the machine; "name" is the name of the training device.

    Args:
        training_device: the device that trains; None for a GPU if there is one.
    """
    if training_device is None:
        training_device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(training_device)
    gpu = gpu_memory = None
    if kind.type == "cuda":
        gpu = torch.cuda.get_device_name(kind)
        gpu_memory = torch.cuda.get_device_properties(kind).total_memory
    cores = os.cpu_count()
    # A process may be bound to some of the cores, which not every system can report.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    cpu_model = _cpu_model()
    return {
        "type": kind.type,
        "name": gpu or cpu_model,
        "gpu": gpu,
        "gpu_memory_bytes": gpu_memory,
        "cpu_model": cpu_model,
        "cpu_cores": cores,
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def peak_memory(training_device: torch.device | str | None = None) -> int:
    """Return the peak memory so far, in bytes.

    If a GPU trains, this is the memory that PyTorch has allocated on it; else that of this process.
    """
    on_gpu = training_device is None or torch.device(training_device).type == "cuda"
    if on_gpu and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(training_device)
    # ru_maxrss would include the peak of the process that started this one.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if match := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(match[1]) * 1024
    # In kilobytes, but on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
