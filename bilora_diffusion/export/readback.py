"""Read exported files back and compare them, layer by layer, with the models that were trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from ..adapters import INITIAL, PRIMARY, Factors, factors, names, state_dict
from ..errors import TrainingError, UserError
from ..lora_names import FILE_NAME, kohya_file_name
from .layers import PEFT_PREFIX, kohya_name
from .lorafile import inspect

TOLERANCE = 1e-5  # relative, per layer; rounding s * B to fp32 makes 6e-8


class _Change(NamedTuple):
    """One layer's change of weight; products are formed when asked for, as all take gigabytes."""

    parts: tuple[Factors, ...]  # the adapter and, with -s, what the init took out of the weight
    magnitude: Tensor | None  # DoRA's, (m,) values in any shape

    def deltas(self) -> list[Tensor]:
        """s * B @ A of each part, (m, n), in fp64 on the CPU."""
        made = []
        for part in self.parts:
            A, B = (side.to("cpu", torch.float64).flatten(1) for side in (part.A, part.B))
            made.append(part.scale * (B @ A))
        return made


@dataclass
class _Difference:
    """The largest differences so far: absolute by weight, relative by layer (Frobenius norms)."""

    file: Path
    layers: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def add(self, what: str, expected: _Change, found: _Change | None) -> None:
        """Compare one layer; raises TrainingError where the file differs from the model."""
        if found is None or (expected.magnitude is None) != (found.magnitude is None):
            raise TrainingError(f"{self.file} lacks all or a part of {what}.")
        self.layers += 1
        parts = expected.deltas()
        # Parts that nearly cancel are rounded each on its own.
        size = sum(part.norm().item() for part in parts)
        self._compare(what, _total(parts), _total(found.deltas()), size)
        if expected.magnitude is not None and found.magnitude is not None:
            sides = (expected.magnitude, found.magnitude)
            m, n = (side.to("cpu", torch.float64).flatten() for side in sides)
            self._compare(f"the magnitude of {what}", m, n, m.norm().item())

    def _compare(self, what: str, expected: Tensor, found: Tensor, size: float) -> None:
        if expected.shape != found.shape:
            shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
            raise TrainingError(f"{self.file} has {what} in the shape {shapes}.")
        gap = found - expected
        relative = gap.norm().item() / max(size, torch.finfo(torch.float64).tiny)
        if not relative <= TOLERANCE:
            raise TrainingError(f"{self.file} differs in {what} from the model, by {relative:.1e}.")
        self.absolute = max(self.absolute, gap.abs().max().item())
        self.relative = max(self.relative, relative)


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def verify(
    folder: str | Path,
    models: Mapping[str, nn.Module],
    fresh: Callable[[], Mapping[str, nn.Module]] | None = None,
) -> dict[str, float]:
    """Prove that `save_diffusers` wrote the primary of `models` into `folder`, and nothing else.

    The diffusers file is loaded into untrained models by diffusers' own loader; then s * B @ A of
    every layer, and DoRA's magnitude, are compared in fp64. A kohya file is compared by its own
    definition, alpha / rank * up @ down, since diffusers' reader of that format leaves out DoRA.

    Args:
        folder: where the files are.
        models: the trained models, as given to `save_diffusers`.
        fresh: makes such models without adapters; they are turned into fp32. By default they are
            built from the configurations in memory that is never written, so even SDXL's UNet
            takes next to none.

    Returns:
        "layers", "max_abs_difference", "max_relative_difference", "auxiliary_keys" (always 0) and,
        with a kohya file, "kohya_max_abs_difference" and "kohya_max_relative_difference".

    Raises:
        TrainingError: an auxiliary is inside, a layer is missing or too many, or one differs by
            more than 1e-5 of its norm.
        UserError: a file can't be read, or `fresh` lacks a model or makes one with adapters.
    """
    path, kohya = Path(folder) / FILE_NAME, Path(folder) / kohya_file_name(folder)
    _check_contents(path, models)
    others = fresh() if fresh else untrained(models)
    _load(path, models, others)
    difference = _Difference(path)
    for component, model in models.items():
        found = _changes(others[component])
        for layer, expected in _changes(model).items():
            difference.add(f"{component}.{layer}", expected, found.get(layer))
    report: dict[str, float] = {
        "layers": difference.layers,
        "max_abs_difference": difference.absolute,
        "max_relative_difference": difference.relative,
        "auxiliary_keys": 0,
    }
    if kohya.exists():
        difference = _compare_kohya(kohya, models)
        report["kohya_max_abs_difference"] = difference.absolute
        report["kohya_max_relative_difference"] = difference.relative
    return report


def untrained(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Models of the same classes and configurations, in fp32 on the CPU, with arbitrary weights."""
    made = {}
    for component, model in models.items():
        kind, config = cast(Any, type(model)), cast(Any, model).config
        with torch.device("meta"):
            is_diffusers = hasattr(kind, "load_config")
            empty = kind.from_config(config) if is_diffusers else kind(config)
        made[component] = empty.to_empty(device="cpu")
    return made


def _check_contents(path: Path, models: Mapping[str, nn.Module]) -> None:
    contents = inspect(path)
    if contents.auxiliary:
        raise TrainingError(f"{path} must hold the primary alone. {' '.join(contents.evidence)}")
    trained = {component: len(factors(model, PRIMARY)) for component, model in models.items()}
    if contents.layers != trained or contents.other_tensors:
        raise TrainingError(
            f"{path} adapts the layers {contents.layers} and has {contents.other_tensors} other "
            f"tensors, but {trained} were trained."
        )


def _load(path: Path, models: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> None:
    from diffusers import StableDiffusionXLPipeline  # slow to import, and `inspect` needs it not

    loader = cast(Any, StableDiffusionXLPipeline)
    tensors, alphas, metadata = loader.lora_state_dict(
        str(path.parent),
        weight_name=path.name,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )
    common = {"network_alphas": alphas, "metadata": metadata, "adapter_name": PRIMARY}
    for component in models:
        if component not in others:
            raise UserError(f"fresh() makes no {component}; return every model that was exported.")
        if present := names(others[component]):
            raise UserError(f"fresh() makes a {component} with adapters {present}; add none to it.")
        model = others[component].float()
        if component == "unet":
            loader.load_lora_into_unet(tensors, unet=model, **common)
        else:
            loader.load_lora_into_text_encoder(
                tensors, text_encoder=model, prefix=component, **common
            )


def _compare_kohya(path: Path, models: Mapping[str, nn.Module]) -> _Difference:
    _check_contents(path, models)
    tensors = safetensors.torch.load_file(path)
    difference = _Difference(path)
    for component, model in models.items():
        for layer, expected in _changes(model).items():
            found = _kohya_change(tensors, kohya_name(component, layer))
            difference.add(f"{component}.{layer}", expected, found)
    return difference


def _kohya_change(tensors: dict[str, Tensor], name: str) -> _Change | None:
    down = tensors.get(f"{name}.lora_down.weight")
    up = tensors.get(f"{name}.lora_up.weight")
    alpha = tensors.get(f"{name}.alpha")
    if down is None or up is None or alpha is None:
        return None
    own = Factors(name, down, up, alpha.item() / down.shape[0])
    return _Change((own,), tensors.get(f"{name}.dora_scale"))


def _changes(model: nn.Module) -> dict[str, _Change]:
    tensors, taken = state_dict(model, PRIMARY), state_dict(model, INITIAL)

    def part(source: dict[str, Tensor], name: str, scale: float) -> Factors:
        A, B = (source[f"{name}.lora_{side}.weight"] for side in "AB")
        return Factors(name, A, B, scale)

    changes = {}
    for name, _, _, scale in factors(model, PRIMARY):
        parts = [part(tensors, name, scale)]
        if f"{name}.lora_A.weight" in taken:
            parts.append(part(taken, name, -scale))
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        changes[name.removeprefix(PEFT_PREFIX)] = _Change(tuple(parts), magnitude)
    return changes
