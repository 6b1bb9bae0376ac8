"""The adapters' factors as they were during training: ``RUN/dynamics/step-N.safetensors``.

One file per recorded step, written whole or not at all. It holds

    factors/ADAPTER/TARGET.MODULE.A, .B     what was trained (not an average of it), as matrices
    layers/NAME                             a figure of each layer, float64; see ``dynamics``

and in its metadata, as JSON, the step, the names of the layers and each adapter's scale on them.
In float32, so that cosines to the final weights are exact: 4 bytes times the trained parameters,
which is 23 MB for SDXL's 560 layers at rank 4, and twice as much with an auxiliary.
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
from ..core.durable import discard, remove_leftovers, sync, write_bytes
from ..core.errors import TrainingError, UserError, translated

FOLDER = "dynamics"
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """One recorded step."""

    step: int  # optimizer steps taken
    factors: dict[str, list[Factors]]  # of each adapter on every layer, A (r, n) and B (m, r)
    layers: dict[str, Tensor]  # figures of each layer, (layers,) float64, nan where undefined

    @property
    def names(self) -> list[str]:
        """The layers as "target.module path", in the order of every list here."""
        layers = next(iter(self.factors.values()))
        return [layer.name for layer in layers]


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot into the run folder ``folder``; an older one of its step is replaced.

    Raises:
        TrainingError: the disk refuses.
    """
    tensors = {f"layers/{name}": values for name, values in snapshot.layers.items()}
    scales: dict[str, list[float]] = {}  # of each adapter on every layer
    for adapter, layers in snapshot.factors.items():
        scales[adapter] = []
        for layer in layers:
            tensors[_key(adapter, layer.name, "A")] = layer.A.contiguous()
            tensors[_key(adapter, layer.name, "B")] = layer.B.contiguous()
            scales[adapter].append(layer.scale)
    description = {
        "schema_version": SCHEMA_VERSION,
        "step": snapshot.step,
        "layers": snapshot.names,
        "scales": scales,
    }
    path = Path(folder) / FOLDER / f"step-{snapshot.step}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        # One entry: safetensors writes several in an order that changes from file to file.
        write_bytes(path, save(tensors, {"snapshot": json.dumps(description)}))
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror}): make room for it and resume, or go on"
            " without --log_dynamics"
        ) from error
    return path


def steps(folder: Path) -> dict[int, Path]:
    """The snapshots in a run folder by step, in order; {} without any."""
    paths = {}
    for path in (Path(folder) / FOLDER).glob("step-*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            paths[int(match[1])] = path
    return dict(sorted(paths.items()))


def read(path: Path) -> Snapshot:
    """One snapshot.

    Raises:
        UserError: it is damaged, or another version wrote it.
    """
    with (
        translated(f"{path} can't be read", "delete it to leave this step out, or train again"),
        safe_open(path, framework="pt") as file,
    ):
        description = json.loads((file.metadata() or {})["snapshot"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        version = description["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, but this version of bilora_diffusion reads"
                f" {SCHEMA_VERSION}: read it with the version that wrote it"
            )
        factors: dict[str, list[Factors]] = {}
        for adapter, scales in description["scales"].items():
            factors[adapter] = []
            for name, scale in zip(description["layers"], scales, strict=True):
                A, B = tensors[_key(adapter, name, "A")], tensors[_key(adapter, name, "B")]
                factors[adapter].append(Factors(name, A, B, float(scale)))
        layer_figures = {}
        for key, values in tensors.items():
            if key.startswith("layers/"):
                layer_figures[key.removeprefix("layers/")] = values
        return Snapshot(description["step"], factors, layer_figures)


def _key(adapter: str, layer: str, side: str) -> str:
    return f"factors/{adapter}/{layer}.{side}"


def truncate(folder: Path, step: int) -> None:
    """Delete the snapshots of steps after ``step``, which a resumed run takes anew."""
    root = Path(folder) / FOLDER
    if not root.is_dir():
        return
    remove_leftovers(root)
    for snapshot_step, path in steps(folder).items():
        if snapshot_step > step:
            discard(path)
    sync(root)


def to_cpu(factors: Sequence[Factors]) -> list[Factors]:
    """Copies on the CPU in their own precision, torch's DTensors and gradients left behind."""
    copies = []
    for layer in factors:
        A = layer.A.detach().to("cpu", copy=True)
        B = layer.B.detach().to("cpu", copy=True)
        copies.append(layer._replace(A=A, B=B))
    return copies
