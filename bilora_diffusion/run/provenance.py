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
CAN_BE_BOUND = hasattr(os, "sched_getaffinity")  # to some of the cores; not everywhere


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, of a run's packages and of ``packages``; None if one is not installed."""
    installed: dict[str, str | None] = dict.fromkeys((*PACKAGES, *packages))
    for name in installed:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    toolkit = sys.modules["bilora_diffusion"].__version__  # also where it is run from a checkout
    return {"python": platform.python_version(), **installed, "bilora_diffusion": toolkit}


def commit(package: Path | None = None) -> tuple[str | None, bool | None]:
    """Commit of the checkout that holds ``package`` (this one), and whether the package differs.

    Both are None outside a checkout, without git, or when the package merely lies inside another
    project's checkout, as in a virtual environment.
    """
    package = package or Path(__file__).resolve().parents[1]
    # A file of the package that git tracks shows that the checkout is the package's own.
    head = None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        head = _git(package, "rev-parse", "--verify", "HEAD")
    if head is None:
        return None, None
    changes = _git(package, "status", "--porcelain", "--", ".")
    return head, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    # A surrounding git command (a hook) would otherwise point this one to its own repository.
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
    return process.stdout.strip() if process.returncode == 0 else None


def device(training_device: torch.device | str | None = None) -> dict[str, str | int | None]:
    """The machine: ``name`` of what computes (by default the GPU when there is one), CPU model,
    usable cores, torch threads, GPU.
    """
    kind = torch.device(training_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = torch.cuda.get_device_name(kind) if kind.type == "cuda" else None
    model = _cpu_model()
    return {
        "type": kind.type,
        "name": gpu or model,
        "gpu": gpu,
        "gpu_memory_bytes": torch.cuda.get_device_properties(kind).total_memory if gpu else None,
        "cpu_model": model,
        "cpu_cores": len(os.sched_getaffinity(0)) if CAN_BE_BOUND else os.cpu_count(),
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
    """Largest memory held so far, in bytes: the GPU's when a GPU trains, else this process'."""
    on_gpu = training_device is None or torch.device(training_device).type == "cuda"
    if on_gpu and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(training_device)
    # ru_maxrss is in kilobytes, but in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
