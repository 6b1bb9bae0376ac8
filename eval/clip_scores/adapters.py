"""An adapter's weights in a pipeline, and out of it again.

with applied(pipeline, subject): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging

from bilora_diffusion import adapters
from bilora_diffusion.errors import UserError
from bilora_diffusion.export import COMPONENTS
from bilora_diffusion.export.layers import Part, diffusers_tensors
from bilora_diffusion.export.reader import read
from bilora_diffusion.train.task import precision

from ..subjects import Subject

_NAME = "compared"
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, IndexError)


@contextmanager
def applied(pipeline: Any, subject: Subject, scale: float = 1.0) -> Iterator[None]:
    """Within the context the pipeline has the subject's weights; afterwards, its own exactly.

    Args:
        pipeline: one without an adapter.
        subject: with weights; the base model has none.
        scale: factor of the adapter's change of the weights.

    Raises:
        UserError: the file does not fit the pipeline, or holds an auxiliary.
    """
    if subject.weights is None:
        yield
    elif subject.weights.is_dir():
        with _models(pipeline, subject.weights, scale):
            yield
    else:
        with _lora(pipeline, subject.weights, scale):
            yield


@contextmanager
def _lora(pipeline: Any, file: Path, scale: float) -> Iterator[None]:
    if any(pipeline.get_list_adapters().values()):
        raise RuntimeError("the pipeline has an adapter already, which would be lost")
    parts = read(file).parts
    try:
        _load_lora(pipeline, file, parts, scale)
        # diffusers only warns of keys that name no layer, and loads the rest.
        wanted = {f"{name}.{layer.name}" for name, part in parts.items() for layer in part.layers}
        if absent := sorted(wanted - _adapted(pipeline)):
            raise UserError(
                f"{file} does not fit the base model, which has no layer for {len(absent)} of its"
                f" {len(wanted)}, such as {absent[0]}: give the base model that it was trained on."
            )
        for model in _parts(pipeline).values():
            # diffusers adds layers in training mode, in which a dropout acts
            model.eval().requires_grad_(False)
        yield
    finally:
        pipeline.unload_lora_weights()


def _load_lora(pipeline: Any, file: Path, parts: Mapping[str, Part], scale: float) -> None:
    # Not the file itself: of kohya's, diffusers takes one alpha for all layers and no magnitudes.
    tensors = diffusers_tensors(parts)
    verbosity = diffusers_logging.get_verbosity()
    try:
        diffusers_logging.set_verbosity_error()  # it warns of each model without an adapter
        pipeline.load_lora_weights(tensors, adapter_name=_NAME)
        pipeline.set_adapters([_NAME], [scale])
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} can't be loaded into the base model ({reason}): give the base model that it"
            " was trained on."
        ) from error
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _parts(pipeline: Any) -> dict[str, Any]:
    """The models of a pipeline that files may hold adapters of, by name."""
    parts = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: model for name, model in parts.items() if model is not None}


def _adapted(pipeline: Any) -> set[str]:
    """The layers that an adapter was put on, as :func:`read` calls them."""
    return {
        f"{component}.{name.removeprefix('text_model.')}"
        for component, model in _parts(pipeline).items()
        for name, _ in adapters.layers(model, _NAME)
    }


@contextmanager
def _models(pipeline: Any, folder: Path, scale: float) -> Iterator[None]:
    if scale != 1.0:
        raise UserError(
            f"{folder} holds whole models, which have no scale: leave the scale at 1, not"
            f" {scale:g}."
        )
    parts, trained = _parts(pipeline), [name for name in COMPONENTS if (folder / name).is_dir()]
    if absent := [name for name in trained if name not in parts]:
        raise UserError(
            f"{folder / absent[0]} does not fit the base model, which has no {absent[0]}: give the"
            " base model that it was trained on."
        )
    before = {name: (parts[name], parts[name].device) for name in trained}
    try:
        for name, (model, device) in before.items():
            other = _load_model(model, folder / name)
            model.to("cpu")  # two of SDXL's UNets need not share a device's memory
            setattr(pipeline, name, other.to(device))
        yield
    finally:
        for name, (model, device) in before.items():
            setattr(pipeline, name, model.to(device))


def _load_model(base: Any, folder: Path) -> Any:
    """The trained model, if it has the base model's shapes."""
    try:
        model = type(base).from_pretrained(folder, dtype=precision(base), use_safetensors=True)
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} can't be loaded ({reason}): train again.") from error
    shapes, others = ({k: v.shape for k, v in one.state_dict().items()} for one in (model, base))
    if shapes != others:
        raise UserError(
            f"{folder} does not fit the base model: give the base model that it was trained on."
        )
    return model.eval().requires_grad_(False)
