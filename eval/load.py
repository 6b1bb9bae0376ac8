"""Load a subject's weights into the base model: a LoRA file or whole models into a pipeline, a PEFT
adapter into a language model.

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

from bilora_diffusion.adapters import PRIMARY, SAMPLING
from bilora_diffusion.config.lora_sources import LoraSource
from bilora_diffusion.core.errors import UserError, as_user_error
from bilora_diffusion.core.lora_names import COMPONENTS
from bilora_diffusion.export.formats import diffusers_tensors
from bilora_diffusion.export.reader import read
from bilora_diffusion.image.frozen_loras import FIX, models_of, require_fit
from bilora_diffusion.text.models import TextModel
from bilora_diffusion.train.task import precision

from .cache import PEFT_FILE
from .subjects import Subject


@contextmanager
def applied(
    pipeline: Any, subject: Subject, scale: float = 1.0, sampling_lora: LoraSource | None = None
) -> Iterator[None]:
    """Load the subject's weights into the pipeline, and restore the original weights on exit.

    Args:
        pipeline: pipeline of the base model, without adapters.
        subject: subject with weights, or the base model, which has none.
        scale: factor of the change that the adapter makes to the weights.
        sampling_lora: LoRA file that is active too, also for the base model.
    """
    file = subject.weights
    has_models = file is not None and file.is_dir()
    if has_models and scale != 1.0:
        raise UserError(
            f"{file} holds whole models, which have no scale: leave the scale at 1, not {scale:g}."
        )
    if any(pipeline.get_list_adapters().values()):
        raise RuntimeError("the pipeline has an adapter already, which would be lost")
    base_models: dict[str, tuple[Any, Any]] = {}
    try:
        if file is not None and has_models:
            base_models = put_models(pipeline, file)
        elif file is not None:
            put_lora(pipeline, file)
        if sampling_lora is not None:
            put_lora(pipeline, sampling_lora.path, SAMPLING)
        set_strengths(pipeline, scale, sampling_lora)
        yield
    finally:
        pipeline.unload_lora_weights()
        for name, (model, device) in base_models.items():
            setattr(pipeline, name, model.to(device))


def set_strengths(pipeline: Any, scale: float, sampling_lora: LoraSource | None = None) -> None:
    """Activate the adapters that `applied` has loaded into a pipeline.

    The subject's adapter gets the strength ``scale``, and the sampling LoRA its own strength.
    """
    strengths = {PRIMARY: scale}
    if sampling_lora is not None:
        strengths[SAMPLING] = sampling_lora.strength
    present: set[str] = set().union(*pipeline.get_list_adapters().values())
    names = [name for name in strengths if name in present]
    if names:
        pipeline.set_adapters(names, [strengths[name] for name in names])
        _freeze(pipeline)


def require_adapter(subject: Subject, source: str) -> None:
    """Raise UserError for a whole model: guidance from another model needs an adapter to leave out.

    Args:
        subject: subject whose samples would get this guidance.
        source: name of the model that makes the unconditional prediction.
    """
    if subject.is_whole_model:
        raise UserError(
            f"guidance from {source} is refused for {subject.label}, which was trained whole and"
            " has no adapter to leave out: use the model's own guidance, or another run."
        )


def put_lora(pipeline: Any, file: Path, adapter: str = PRIMARY) -> None:
    """Load a LoRA file into a pipeline, as an adapter with this name."""
    parts = read(file).parts
    models = models_of(pipeline)
    # diffusers only warns about keys without a layer, and loads the others.
    require_fit(file, parts, models)
    # diffusers does not read all of a kohya file: it uses one alpha for all layers and ignores
    # DoRA's magnitudes.
    tensors = diffusers_tensors(parts)
    verbosity = diffusers_logging.get_verbosity()
    try:
        # diffusers warns about each model that has no adapter in the file.
        diffusers_logging.set_verbosity_error()
        with as_user_error(f"{file} can't be loaded into the base model", FIX):
            pipeline.load_lora_weights(tensors, adapter_name=adapter)
    finally:
        diffusers_logging.set_verbosity(verbosity)
    _freeze(pipeline)


def _freeze(pipeline: Any) -> None:
    """Set the models to evaluation mode, which turns off dropout, and freeze all parameters.

    diffusers adds adapters in training mode, and makes active adapters trainable.
    """
    for model in models_of(pipeline).values():
        model.eval().requires_grad_(False)


def put_models(pipeline: Any, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Replace models of a pipeline with the whole models in a folder.

    Returns:
        Name -> the replaced model, which is now on the CPU, and its previous device.
    """
    models = models_of(pipeline)
    # All models are loaded before the first one is replaced: an error leaves the pipeline intact.
    trained_models = {}
    for name in COMPONENTS:
        if not (folder / name).is_dir():
            continue
        if name not in models:
            raise UserError(
                f"{folder / name} does not fit the base model, which has no {name}: {FIX}."
            )
        trained_models[name] = _load_model(models[name], folder / name)
    replaced = {}
    for name, trained_model in trained_models.items():
        model = models[name]
        replaced[name] = (model, model.device)
        device = model.device
        model.to("cpu")  # a device may be too small for two SDXL UNets
        setattr(pipeline, name, trained_model.to(device))
    return replaced


def _load_model(base: Any, folder: Path) -> Any:
    """Load a trained model from a folder.

    Raises:
        UserError: the files can't be loaded, or the names or shapes of the tensors differ from
            those of the base model.
    """
    with as_user_error(f"{folder} can't be loaded", "train again"):
        model = type(base).from_pretrained(folder, dtype=precision(base), use_safetensors=True)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes != {key: value.shape for key, value in base.state_dict().items()}:
        raise UserError(f"{folder} does not fit the base model: {FIX}.")
    return model.eval().requires_grad_(False)


def put_peft(base: TextModel, folder: Path) -> Any:
    """Return the base model with the PEFT adapter in a folder.

    Raises:
        UserError: the adapter can't be loaded, or its tensors and those of the adapted model do not
            match.
    """
    from peft import PeftModel, get_peft_model_state_dict

    fix = f"{FIX} by --model_name_or_path"
    with as_user_error(f"the adapter in {folder} can't be put on its base model", fix):
        file_tensors = load_file(folder / PEFT_FILE)
        adapted = PeftModel.from_pretrained(base.model, str(folder))
    model_tensors = get_peft_model_state_dict(adapted)
    missing_names = []
    # PEFT loads the tensors that fit, and silently ignores the others.
    for name, tensor in file_tensors.items():
        if name not in model_tensors or not torch.equal(
            model_tensors[name].cpu().to(tensor.dtype), tensor
        ):
            missing_names.append(name)
    if missing_names or len(model_tensors) != len(file_tensors):
        examples = ", ".join(missing_names[:2]) or "the model needs further tensors"
        raise UserError(
            f"the adapter in {folder} does not fit the model: {len(missing_names)} of its"
            f" {len(file_tensors)} tensors could not be loaded ({examples}): {fix}."
        )
    return adapted.eval()
