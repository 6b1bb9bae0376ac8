"""Origin of a result: the command, and the versions, commit and machine of its runs.

Results are shared and published, so a path of one machine never enters them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilora_diffusion.core.files import without_paths


@dataclass(frozen=True)
class Provenance:
    """Origin of a result.

    Args:
        command: the command line, absolute paths shortened to names.
        versions: of Python and the packages that trained.
        commit: of the code that trained; None outside a checkout.
        uncommitted_changes: whether that code differed from the commit.
        device: the machine that trained.
        differing: which of the above are not the same in all runs; the first run's are given.
    """

    command: str
    versions: dict[str, Any]
    commit: str | None
    uncommitted_changes: bool | None
    device: dict[str, Any]
    differing: list[str]


def command_line(module: str, argv: Sequence[str]) -> str:
    """``python -m MODULE ARGV`` as a person would write it, without machine paths."""
    return f"python -m {module} {shlex.join(without_paths(word) for word in argv)}"


def of_runs(command: str, records: Sequence[Mapping[str, Any]]) -> Provenance | None:
    """The provenance of a result of several runs; None without a run."""
    if not records:
        return None
    keys = ("versions", "commit", "uncommitted_changes", "device")
    first: dict[str, Any] = {key: records[0].get(key) for key in keys}
    differing = [key for key in keys if any(r.get(key) != first[key] for r in records)]
    first |= {key: first[key] or {} for key in ("versions", "device")}
    return Provenance(command=command, differing=differing, **first)


def of_this_process(command: str, device: Any, packages: Sequence[str] = ()) -> Provenance:
    """The provenance of what is computed here and now."""
    from bilora_diffusion.run import provenance  # here, so that --help does not wait for torch

    commit, changes = provenance.commit()
    versions = provenance.versions(*packages)
    return Provenance(command, versions, commit, changes, provenance.device(device), [])
