"""The adapters' values as flat tensors: what a checkpoint holds of the models."""

from __future__ import annotations

from torch import Tensor

from . import adapters
from .errors import UserError
from .methods import Method
from .tasks.base import Task


def adapter_tensors(task: Task, method: Method) -> dict[str, Tensor]:
    """Every adapter parameter of every target, keyed ``target/adapter/parameter``."""
    return {
        f"{target.name}/{adapter}/{name}": parameter.detach()
        for target in task.targets()
        for adapter in method.adapters
        for name, parameter in adapters.named_parameters(target.model, adapter).items()
    }


def load_adapter_tensors(task: Task, method: Method, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into the adapters.

    Raises:
        UserError: a parameter is missing, superfluous, or of another shape.
    """
    current = adapter_tensors(task, method)
    if current.keys() != tensors.keys():
        odd = sorted(current.keys() ^ tensors.keys())[0]
        raise UserError(
            f"the checkpoint and the model disagree on the parameter '{odd}': resume with the"
            " flags that the run was started with."
        )
    for name, parameter in current.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(
                f"'{name}' has shape {tuple(tensors[name].shape)} in the checkpoint and"
                f" {tuple(parameter.shape)} in the model: resume with the run's own flags."
            )
        parameter.data.copy_(tensors[name])
