"""The engine of accelerate that training runs on, as far as it decides what would be wrong.

DDP trains everything, FSDP2 adapters of text models (`sharding`); `config.launches` says what is
refused.
"""

from __future__ import annotations

import logging
import os
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from ..config import refusals
from ..config.launches import DDP, FSDP2
from ..run.config import RunConfig

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
    kind, state = accelerator.distributed_type.value, cast(Any, accelerator.state)
    engine, bad = DDP if kind == "NO" or kind.startswith("MULTI_") else kind, {}
    compiled = state.dynamo_plugin.backend != DynamoBackend.NO
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import CPUOffloadPolicy
        from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

        engine, plugin = FSDP2, state.fsdp_plugin
        bad = {
            "FSDP_OFFLOAD_PARAMS": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "FSDP_ACTIVATION_CHECKPOINTING": bool(plugin.activation_checkpointing),
            "FSDP_IGNORED_MODULES": plugin.ignored_modules is not None,
            "SIZE_BASED_WRAP": plugin.auto_wrap_policy is size_based_auto_wrap_policy,
            "ACCELERATE_DYNAMO_BACKEND": compiled,
        }
    elif kind == "MULTI_CPU" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        engine = "FSDP on CPUs"  # accelerate would train by DDP without a word
    if accelerator.parallelism_config is not None:
        engine = "a parallelism config"
    setting = next((name for name, given in bad.items() if given), None)
    return {"engine": engine, "fsdp_setting": setting, "compiled": compiled}
