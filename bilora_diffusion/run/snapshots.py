"""The adapters' factors during training: ``RUN/dynamics/step-N.safetensors``.

There is one file for each recorded step, which is written atomically. It contains

    factors/ADAPTER/TARGET.MODULE.A, .B     the trained factors, as matrices
    layers/NAME                             one value per layer, float64; see `train.dynamics`

Its metadata contains, as JSON, the schema version, the step, the layers' names and each adapter's
scales. The factors keep the dtype in which they are trained, normally float32, so that cosines to
the final weights are exact. They take 23 MB for SDXL's 560 layers at rank 4, and twice as much with
an auxiliary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..adapters import Factors
from ..core.durable import (
    discard,
    remove_leftovers,
    sync,
    write_bytes,
)
from ..core.errors import TrainingError, UserError, as_user_error

FOLDER = "dynamics"
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """One recorded step."""

    step: int  # number of optimizer steps taken
    factors: dict[str, list[Factors]]  # by adapter, each layer's factors A (r, n) and B (m, r)
    layers: dict[str, Tensor]  # by name, one value per layer, (layers,) float64; nan if missing

    @property
    def names(self) -> list[str]:
        """Names of the layers as "target.module path", in the order of all lists of this class."""
        return [f.name for f in next(iter(self.factors.values()))]


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot into the run folder ``folder``; replace an older one of the same step.

    Raises:
        TrainingError: the disk is full or read-only.
    """
    tensors: dict[str, Tensor] = {}
    for name, values in snapshot.layers.items():
        tensors[f"layers/{name}"] = values
    scales: dict[str, list[float]] = {}
    for adapter, layers in snapshot.factors.items():
        scales[adapter] = []
        for layer in layers:
            tensors[_key(adapter, layer.name, "A")] = layer.A.contiguous()
            tensors[_key(adapter, layer.name, "B")] = layer.B.contiguous()
            scales[adapter].append(layer.scale)
    header = {
        "schema_version": SCHEMA_VERSION,
        "step": snapshot.step,
        "layers": snapshot.names,
        "scales": scales,
    }
    path = Path(folder) / FOLDER / f"step-{snapshot.step}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        # The metadata has one entry, since safetensors writes several in an order that varies.
        write_bytes(path, save(tensors, {"snapshot": json.dumps(header)}))
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror}): free some space and resume, or"
            " continue without --log_dynamics"
        ) from error
    return path


def steps(folder: Path) -> dict[int, Path]:
    """Return the snapshots in a run folder by step, in order."""
    files: dict[int, Path] = {}
    for path in (Path(folder) / FOLDER).glob("step-*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            files[int(match[1])] = path
    return dict(sorted(files.items()))


def read(path: Path) -> Snapshot:
    """Read one snapshot.

    Raises:
        UserError: the snapshot is damaged, or another version wrote it.
    """
    with (
        as_user_error(f"{path} can't be read", "delete it to leave this step out, or train again"),
        safe_open(path, framework="pt") as file,
    ):
        header = json.loads((file.metadata() or {})["snapshot"])
        # The file is not a dictionary: it can't be iterated without `keys`.
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {header['schema_version']}, but this version of"
                f" bilora_diffusion reads {SCHEMA_VERSION}: read it with the version that wrote it"
            )
        factors: dict[str, list[Factors]] = {}
        for adapter, scales in header["scales"].items():
            factors[adapter] = []
            for name, scale in zip(header["layers"], scales, strict=True):
                A = tensors[_key(adapter, name, "A")]
                B = tensors[_key(adapter, name, "B")]
                factors[adapter].append(Factors(name, A, B, scale=float(scale)))
        layers: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if key.startswith("layers/"):
                layers[key.removeprefix("layers/")] = tensor
        return Snapshot(header["step"], factors, layers)


def _key(adapter: str, layer: str, side: str) -> str:
    return f"factors/{adapter}/{layer}.{side}"


def truncate(folder: Path, last_step: int) -> None:
    """Delete the snapshots of steps after ``last_step``, which a resumed run repeats."""
    root = Path(folder) / FOLDER
    if not root.is_dir():
        return
    remove_leftovers(root)
    for step, path in steps(folder).items():
        # The snapshot of ``last_step`` itself stays.
        if step > last_step:
            discard(path)
    sync(root)


def to_cpu(factors: Sequence[Factors]) -> list[Factors]:
    """Return copies of the factors on the CPU, in their precision and without gradients."""
    copies: list[Factors] = []
    for layer in factors:
        A = layer.A.detach().to("cpu", copy=True)
        B = layer.B.detach().to("cpu", copy=True)
        copies.append(layer._replace(A=A, B=B))
    return copies
