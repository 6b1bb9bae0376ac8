"""Checks that a trainer and its settings train Bi-LoRA correctly."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

from .. import adapters
from ..api import BiLoRA
from ..config import constraints
from ..core.errors import UserError
from ..methods.base import unwrap
from ..methods.bilora.auxiliary import check_groups

# TRL's name for the copy of an adapter that is the reference of a preference loss.
REFERENCE = "ref"
# Optimizers that keep or replace weights themselves, which the projection would miss.
_OTHER_WEIGHTS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")


def check_trainer(trainer: Any) -> None:
    """Check that a trainer can train Bi-LoRA correctly.

    Raises:
        UserError: the object is not a `Trainer` or already has Bi-LoRA, its engine shards or
            replaces parameters, its optimizer is not supported, or it has `model_init`.
    """
    if not isinstance(trainer, Trainer):
        raise UserError(
            f"use_bilora got a {type(trainer).__name__}; pass a Trainer of Transformers or TRL, or "
            "use attach in your own training loop."
        )
    if hasattr(trainer, "bilora"):
        raise UserError("use_bilora was already called for this trainer; call it only once.")
    # `optim` is a member of a Transformers enum, or its value.
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    has_other_weights = optim.startswith(_OTHER_WEIGHTS) or optim.endswith("layerwise")
    facts = {
        "trainer_engine": unsuited_engine(trainer),
        "model_init": trainer.model_init is not None,
        "optim": optim if has_other_weights else None,
    }
    constraints.check(facts)


def unsuited_engine(trainer: Any) -> str | None:
    """Return the name of a trainer's engine if it shards or replaces parameters, else None."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        return "FSDP"
    if trainer.is_distributed_loading_by_transformers:
        return "a sharded model (distributed_config)"
    if is_sagemaker_mp_enabled():
        return "SageMaker model parallelism"
    engine = trainer.accelerator.distributed_type
    # The ball's norm needs all parameters in each process, as with a single process or with DDP.
    has_all_parameters = engine == DistributedType.NO or engine.value.startswith("MULTI_")
    return None if has_all_parameters else str(engine.value)


def check_model(trainer: Any, bilora: BiLoRA) -> None:
    """Check that a trainer has the model with the adapters and uses all of them.

    Raises:
        UserError: the trainer's model is not the one with the adapters, or TRL would ignore an
            adapter or disable the auxiliary.
    """
    if trainer.model is not bilora.model:
        fix = "give the trainer the model that you passed to attach"
        if isinstance(trainer.model, PeftModel):
            fix = "remove peft_config, since the model already has the adapters"
        raise UserError(
            f"The trainer's model is a {type(trainer.model).__name__}, not the "
            f"{type(bilora.model).__name__} that was passed to attach; {fix}."
        )
    # TRL's trainers compute logits and loss in one step, from the output layer's weight.
    packages = [base.__module__.partition(".")[0] for base in type(trainer).__mro__]
    output_head = adapters.output_head(trainer.model)
    if "trl" in packages and isinstance(output_head, adapters.LoraLayer):
        raise UserError(
            "target_modules names the output layer, but TRL's trainers use its weight without the "
            'adapter; remove it from target_modules ("all-linear" does not include it).'
        )
    # TRL copies a PeftModel's adapter as its reference. After each pass with the copy, it activates
    # only one adapter.
    if "trl" in packages and REFERENCE in getattr(trainer.model, "peft_config", {}):
        raise UserError(
            f"{type(trainer).__name__} copied the model's adapter as its reference and would"
            " disable the auxiliary after each use of the copy; pass a model without adapters,"
            " since use_bilora adds them, or call merge_and_unload on the trained adapter first."
        )


def check_trainable(bilora: BiLoRA) -> None:
    """Check that all trainable parameters would be saved and keep small updates.

    Raises:
        UserError: a parameter of the base model is trainable, an adapter is in half precision, or
            the init still needs a gradient.
    """
    trained_parameters = []
    # `param_groups` raises UserError if the init still needs a gradient.
    for group in bilora.param_groups(lr=0.0):
        trained_parameters += group["params"]
    trained_ids = {id(parameter) for parameter in trained_parameters}
    for name, parameter in bilora.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained_ids:
            raise UserError(
                f"{name} is trainable, but only the adapters would be trained and saved; freeze "
                "it with requires_grad_(False), or name its module in modules_to_save."
            )
    for parameter in trained_parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"The adapters are in {parameter.dtype}, which loses small updates (bf16_full_eval "
                "and fp16_full_eval cast adapters); train before such an evaluation, or attach "
                "adapters to a newly loaded model."
            )


def check_optimizer(optimizer: Any, bilora: BiLoRA) -> None:
    """Check that an optimizer's steps ascend on the auxiliary and project it.

    Raises:
        UserError: the optimizer has other parameter groups, or was not bound.
    """
    method = bilora._method
    check_groups(unwrap(optimizer), method.result_parameters(), method.auxiliary_parameters())
    if not is_bound(optimizer, bilora):
        raise UserError(
            "The trainer's optimizer is not the one that was bound, so the auxiliary would not be "
            "projected; let the trainer create its optimizer, or pass the bound one as "
            "optimizers=(optimizer, None)."
        )


def is_bound(optimizer: Any, bilora: BiLoRA) -> bool:
    """Return whether the auxiliary is projected after each step of this optimizer."""
    return bilora._method.optimizer is unwrap(optimizer)
