"""An adapter's weights on its base model: a LoRA file or whole models in a pipeline, and out of it
again; a PEFT adapter on a language model.

with applied(pipeline, subject): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.core.lora_names import COMPONENTS
from bilora_diffusion.export.formats import diffusers_tensors, plain_name
from bilora_diffusion.export.reader import read
from bilora_diffusion.text.models import TextModel
from bilora_diffusion.train.task import precision

from .cache import PEFT_FILE
from .subjects import Subject

FIX = "give the base model that it was trained on"


@contextmanager
def applied(pipeline: Any, subject: Subject, scale: float = 1.0) -> Iterator[None]:
    """Within the context the pipeline has the subject's weights; afterwards, its own exactly."""
    file, before = subject.weights, {}
    if file is None:
        yield
        return
    has_whole_models = file.is_dir()
    if has_whole_models:
        if scale != 1.0:
            raise UserError(
                f"{file} holds whole models, which have no scale: leave the scale at 1, not"
                f" {scale:g}."
            )
    elif any(pipeline.get_list_adapters().values()):
        raise RuntimeError("the pipeline has an adapter already, which would be lost")
    try:
        if has_whole_models:
            before = put_models(pipeline, file)
        else:
            put_lora(pipeline, file, scale)
        yield
    finally:
        if not has_whole_models:
            pipeline.unload_lora_weights()
        for name, (model, device) in before.items():
            setattr(pipeline, name, model.to(device))


def require_adapter(subject: Subject) -> None:
    """Refuse guidance from the base model for whole models, which hold no adapter to leave out."""
    if subject.weights is not None and subject.weights.is_dir():
        raise UserError(
            f"guidance from the base model is refused for {subject.label}, which was trained whole"
            " and has no adapter to leave out: drop one of the two."
        )


def put_lora(pipeline: Any, file: Path, scale: float = 1.0) -> None:
    """Put a LoRA file on a pipeline's models, as their primary."""
    parts = read(file).parts
    # Not the file itself: of kohya's, diffusers takes one alpha for all layers and no magnitudes.
    tensors = diffusers_tensors(parts)
    verbosity = diffusers_logging.get_verbosity()
    try:
        diffusers_logging.set_verbosity_error()  # it warns of each model without an adapter
        with translated(f"{file} can't be loaded into the base model", FIX):
            pipeline.load_lora_weights(tensors, adapter_name=PRIMARY)
            pipeline.set_adapters([PRIMARY], [scale])
    finally:
        diffusers_logging.set_verbosity(verbosity)
    # diffusers only warns of keys that name no layer, and loads the rest.
    models = _parts(pipeline)
    expected, adapted = set(), set()
    for component, part in parts.items():
        expected |= {f"{component}.{layer.name}" for layer in part.layers}
    for component, model in models.items():
        for name, _ in adapters.layers(model, PRIMARY):
            adapted.add(f"{component}.{plain_name(name)}")
    absent = sorted(expected - adapted)
    if absent:
        raise UserError(
            f"{file} does not fit the base model, which has no layer for {len(absent)} of its"
            f" {len(expected)}, such as {absent[0]}: {FIX}."
        )
    for model in models.values():
        # diffusers adds layers in training mode, in which a dropout acts
        model.eval().requires_grad_(False)


def put_models(pipeline: Any, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Put whole models of a folder in the place of a pipeline's own.

    Returns:
        Name -> own model and its device.
    """
    parts, trained = _parts(pipeline), [name for name in COMPONENTS if (folder / name).is_dir()]
    absent = [name for name in trained if name not in parts]
    if absent:
        raise UserError(
            f"{folder / absent[0]} does not fit the base model, which has no {absent[0]}: {FIX}."
        )
    before = {name: (parts[name], parts[name].device) for name in trained}
    loaded = {name: _load_model(model, folder / name) for name, (model, _) in before.items()}
    for name, (model, device) in before.items():
        model.to("cpu")  # two of SDXL's UNets need not share a device's memory
        setattr(pipeline, name, loaded[name].to(device))
    return before


def _load_model(base: Any, folder: Path) -> Any:
    """The trained model, if it has the base model's shapes."""
    with translated(f"{folder} can't be loaded", "train again"):
        model = type(base).from_pretrained(folder, dtype=precision(base), use_safetensors=True)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes != {key: value.shape for key, value in base.state_dict().items()}:
        raise UserError(f"{folder} does not fit the base model: {FIX}.")
    return model.eval().requires_grad_(False)


def _parts(pipeline: Any) -> dict[str, Any]:
    """The models of a pipeline that files may hold adapters of, by name."""
    parts = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: model for name, model in parts.items() if model is not None}


def put_peft(base: TextModel, folder: Path) -> Any:
    """The base model with a PEFT adapter, which has arrived whole."""
    from peft import PeftModel, get_peft_model_state_dict

    fix = f"{FIX} by --model_name_or_path"
    with translated(f"the adapter in {folder} can't be put on its base model", fix):
        written = load_file(folder / PEFT_FILE)
        adapted = PeftModel.from_pretrained(base.model, str(folder))
    arrived = get_peft_model_state_dict(adapted)
    astray = []
    # PEFT loads what fits and is silent about the rest.
    for name, tensor in written.items():
        if name not in arrived or not torch.equal(arrived[name].cpu().to(tensor.dtype), tensor):
            astray.append(name)
    if astray or len(arrived) != len(written):
        raise UserError(
            f"the adapter in {folder} does not fit the model: {len(astray)} of its {len(written)}"
            f" tensors found no place ({', '.join(astray[:2]) or 'and others are missing'}): {fix}."
        )
    return adapted.eval()
