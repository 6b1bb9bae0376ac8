"""The engine of accelerate that training runs on, as far as it decides what would be wrong.

DDP trains everything, FSDP2 adapters of text models (`sharding`); `config.launches` says what is
refused.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from ..config import refusals
from ..config.launches import DDP, FSDP2
from ..run.config import RunConfig

ENGINES = {
    DistributedType.FSDP: "FSDP1",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
    DistributedType.XLA: "XLA",
}
"""Engines other than DDP, which accelerate calls MULTI_ and the kind of device."""
logger = logging.getLogger(__name__)


def check(cfg: RunConfig, accelerator: Accelerator) -> None:
    """Refuse engines and combinations that would be wrong; call it before a model is loaded.

    Under FSDP2 it also asks every process to read the model's file: accelerate's
    ``FSDP_CPU_RAM_EFFICIENT_LOADING`` hands out empty weights, on which no adapter can be put.

    Raises:
        UserError: one sentence with the reason and what to use instead.
    """
    refusals.check({**cfg.to_dict(), **facts(accelerator), "modality": cfg.modality})
    plugin: Any = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # Transformers reads it there
        logger.info("every process reads the weights, whatever FSDP_CPU_RAM_EFFICIENT_LOADING says")


def facts(accelerator: Accelerator) -> dict[str, Any]:
    """How accelerate was launched, by the names of `conditions.FACTS`."""
    kind = accelerator.distributed_type
    state: Any = accelerator.state
    launch = {
        "engine": FSDP2 if accelerator.is_fsdp2 else ENGINES.get(kind, DDP),
        "parallelism_config": accelerator.parallelism_config is not None,
        "use_fsdp": os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true",
        "on_cpu": kind == DistributedType.MULTI_CPU,
        "compiled": state.dynamo_plugin.backend != DynamoBackend.NO,
    }
    if not accelerator.is_fsdp2:
        return launch
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    plugin = state.fsdp_plugin
    return launch | {
        "offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing": bool(plugin.activation_checkpointing),
        "ignored_modules": plugin.ignored_modules is not None,
        "size_based_wrap": plugin.auto_wrap_policy is size_based_auto_wrap_policy,
    }
