"""Checks that refuse, in one sentence each, what the trainers would get silently wrong."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

from .. import adapters
from ..adapters import AUXILIARY
from ..api import BiLoRA
from ..config import constraints
from ..core.errors import UserError
from ..methods.base import unwrapped

_OTHER_WEIGHTS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
"""Optimizers that keep or project weights of their own, of which the ball knows nothing."""


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer under which Bi-LoRA would be wrong: an engine that shards or replaces
    parameters, an optimizer that can't be used, `model_init`, or no trainer at all.
    """
    if not isinstance(trainer, Trainer):
        raise UserError(
            f"use_bilora got a {type(trainer).__name__}; give a Trainer of Transformers or TRL, or "
            "see attach for a loop of your own."
        )
    if hasattr(trainer, "bilora"):
        raise UserError("use_bilora was called for this trainer already; call it once.")
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    other_weights = optim.startswith(_OTHER_WEIGHTS) or optim.endswith("layerwise")
    constraints.check(
        {
            "trainer_engine": engine_name(trainer),
            "model_init": trainer.model_init is not None,
            "optim": optim if other_weights else None,
        }
    )


def engine_name(trainer: Any) -> str | None:
    """The engine of a trainer if it is one that does not work, else None."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        return "FSDP"
    if trainer.is_distributed_loading_by_transformers:
        return "a sharded model (distributed_config)"
    if is_sagemaker_mp_enabled():
        return "SageMaker model parallelism"
    kind = trainer.accelerator.distributed_type
    # Under these every process holds every parameter, so that the ball's norm sees all.
    holds_every_parameter = kind == DistributedType.NO or kind.value.startswith("MULTI_")
    return None if holds_every_parameter else str(kind.value)


def check_model(trainer: Any, bilora: BiLoRA) -> None:
    """Refuse a trainer that would train another model than the one with the adapters, or pass by
    the adapter of the output layer.
    """
    if trainer.model is not bilora.model:
        fix = "give the trainer the model that you gave to attach"
        if isinstance(trainer.model, PeftModel):
            fix = "leave peft_config out, the adapters are on the model already"
        raise UserError(
            f"The trainer's model is a {type(trainer.model).__name__}, not the "
            f"{type(bilora.model).__name__} that attach was called for; {fix}."
        )
    constraints.check(
        {
            "method": "bilora",
            "auxiliaries": bilora.config.auxiliaries,
            "trainer_processes": trainer.args.world_size,
        }
    )
    fused_head = any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)
    if fused_head and isinstance(adapters.output_head(trainer.model), adapters.LoraLayer):
        raise UserError(
            "target_modules names the output layer, whose weight TRL's trainers read past the "
            'adapter; take it out of target_modules ("all-linear" leaves it out).'
        )


def check_trainable(bilora: BiLoRA) -> None:
    """Refuse parameters that somebody has unfrozen, adapters that can't hold small updates, and an
    init that still needs a gradient.
    """
    group_parameters = [p for group in bilora.param_groups(lr=0.0) for p in group["params"]]
    adapter_ids = {
        id(p) for p in (*group_parameters, *adapters.parameters(bilora.model, AUXILIARY))
    }
    for name, parameter in bilora.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter_ids:
            raise UserError(
                f"{name} is trainable, but only the adapters would be trained and saved; freeze "
                "it by requires_grad_(False), or name its module in modules_to_save."
            )
    if rounded := [
        p.dtype for p in group_parameters if p.dtype not in (torch.float32, torch.float64)
    ]:
        raise UserError(
            f"The adapters are in {rounded[0]}, in which small updates are lost (a full evaluation "
            "in half precision casts them); train before it, or attach anew."
        )


def check_optimizer(optimizer: Any, bilora: BiLoRA) -> None:
    """Refuse an optimizer that does not climb on the auxiliary and project it."""
    bilora._method.check_groups(unwrapped(optimizer))
    if not is_bound(optimizer, bilora):
        raise UserError(
            "The optimizer that trains is not the one that was bound, so the auxiliary would leave "
            "the ball; let the trainer make the optimizer, or give it by optimizers=(..., None)."
        )


def is_bound(optimizer: Any, bilora: BiLoRA) -> bool:
    """Test that the auxiliary is projected after the steps of this optimizer."""
    return bilora._method.optimizer is unwrapped(optimizer)
