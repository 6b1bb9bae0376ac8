"""Versions, commit and machine are found, or said to be unknown."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bilora_diffusion
from bilora_diffusion.run import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert provenance.commit(package) == (None, None)
    git(package.parent, "init", "-q")
    assert provenance.commit(package) == (None, None)  # not one of its files
    git(package.parent, "add", ".")
    assert provenance.commit(package) == (None, None)  # no commit yet
    git(package.parent, "commit", "-q", "-m", "x")
    head = git(package.parent, "rev-parse", "HEAD")
    assert provenance.commit(package) == (head, False)
    (package / "__init__.py").write_text("x = 1")
    installed = package.parent / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.commit(installed) == (None, None)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of another repository
    assert provenance.commit(package) == (head, True)
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(package) == (None, None)


def test_versions_and_the_gpus_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    assert provenance.versions() == {
        "python": platform.python_version(),
        "no-such-package": None,
        "bilora_diffusion": bilora_diffusion.__version__,
    }
    memory = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    machine = provenance.device("cuda")
    assert (machine["type"], machine["name"], machine["gpu"]) == ("cuda", "Some GPU", "Some GPU")
    assert machine["gpu_memory_bytes"] == memory.total_memory
    assert machine["cpu_model"] == provenance.device("cpu")["name"] != "Some GPU"
