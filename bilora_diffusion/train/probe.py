"""The two nets for what a run is given: whatever a library raises before the first step becomes one
sentence, and one row goes forward and backward, whose loss and gradients have to be finite.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ..errors import UserError, translated
from .trainer import Trainer

FIX = "give another model or other parts of it, or other options"


def trainable(model: str) -> AbstractContextManager[None]:
    """A context in which an error of a library says that a model can't be trained as asked."""
    return translated(f'"{model}" can\'t be trained so', FIX)


def probe(trainer: Trainer, model: str) -> None:
    """Take one row forward and backward, as a step does, and forget its gradients.

    Raises:
        UserError: its loss or a gradient is not finite.
    """
    step_size, (slot, *_) = trainer.schedule.step_size, trainer.schedule.slots()[0]
    (batch,) = trainer.task.micro_batches([(0, (slot,))], step_size)
    loss = trainer.forward_backward([batch])()
    weights = trainer.method.clip_parameters()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if trainer.accelerator.scaler is not None:  # which starts too high, and finds a scale that fits
        gradients = []
    finite = [values.isfinite().all() for values in (loss, *gradients)]
    trainer.clipped.zero_grad()
    if not bool(torch.stack([one.to(loss.device) for one in finite]).all()):
        raise UserError(
            f'"{model}" gives {batch.names[0]} a loss or gradients that are not finite: {FIX}.'
        )
