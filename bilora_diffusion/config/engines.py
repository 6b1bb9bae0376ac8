"""Which engines of accelerate train what: the one table of launches that would be wrong.

DDP trains everything, FSDP2 adapters of text models (see ``sharding``). What stands here is refused
before a model is loaded, with the reason and what to use instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from ..errors import UserError

FSDP2 = "FSDP2"
DDP = "DDP"
ENGINES = {
    DistributedType.FSDP: "FSDP1",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
    DistributedType.XLA: "XLA",
}
"""Engines other than DDP, which accelerate calls MULTI_ and the kind of device."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """A way to launch training that is refused.

    Args:
        what: the beginning of the sentence.
        when: what `launch` must say, key by key; a tuple gives alternatives.
        reason: a clause that follows "since".
        instead: what to do about it, in the imperative.
    """

    what: str
    when: Mapping[str, Any]
    reason: str
    instead: str

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether this launch is refused."""
        return all(
            values.get(key) in (wanted if isinstance(wanted, tuple) else (wanted,))
            for key, wanted in self.when.items()
        )

    @property
    def sentence(self) -> str:
        """What the user reads."""
        return f"{self.what} is refused, since {self.reason}: {self.instead}."


_SPLIT = "it splits the adapters, of which the auxiliary's norm and its projection need the whole"
_USE_FSDP2 = (
    "set fsdp_version to 2 for a text model too large for one device, or launch with"
    " --multi_gpu (DDP)"
)

REFUSED: tuple[Refusal, ...] = (
    Refusal("FSDP1", {"engine": "FSDP1"}, _SPLIT, _USE_FSDP2),
    Refusal("DeepSpeed", {"engine": "DeepSpeed"}, _SPLIT, _USE_FSDP2),
    Refusal("Megatron-LM", {"engine": "Megatron-LM"}, _SPLIT, _USE_FSDP2),
    Refusal(
        "XLA",
        {"engine": "XLA"},
        "it averages gradients in its own optimizer step, before which they are clipped here",
        _USE_FSDP2,
    ),
    Refusal(
        "a parallelism config",
        {"parallelism_config": True},
        "rows are dealt to processes by their number alone, and processes that share one model or"
        " one sequence would get different rows",
        "drop ACCELERATE_USE_PARALLELISM_CONFIG and launch with FSDP2 or --multi_gpu",
    ),
    Refusal(
        "FSDP on CPUs",
        {"engine": DDP, "use_fsdp": True, "cpu": True},
        "accelerate would split nothing there and train by DDP without a word",
        "drop --use_fsdp",
    ),
    # what is trained
    Refusal(
        "FSDP2 for an image model",
        {"engine": FSDP2, "task": "image"},
        "text encoders and autoencoder work beside the UNet in passes that FSDP2 knows nothing of",
        "launch with --multi_gpu (DDP), or add --quantize nf4 if memory is short",
    ),
    Refusal(
        "--method full under FSDP2",
        {"engine": FSDP2, "method": "full"},
        "what is trained stays whole on every device, and here that is all of the model",
        "use --method bilora, lora or another with adapters, or launch with --multi_gpu (DDP)",
    ),
    Refusal(
        "--method flat-lora under FSDP2",
        {"engine": FSDP2, "method": "flat-lora"},
        "its noise is scaled by the norms of the base's rows, of which a device holds a part",
        "use --method bilora or lora-sam, or launch with --multi_gpu (DDP)",
    ),
    Refusal(
        "--init_lora_weights pissa or lora-ga under FSDP2",
        {"engine": FSDP2, "init_lora_weights": ("pissa", "lora-ga")},
        "this start is computed from whole base weights and taken out of them",
        "use --init_lora_weights default or gaussian, or launch with --multi_gpu (DDP)",
    ),
    Refusal(
        "--quantize nf4 under FSDP2",
        {"engine": FSDP2, "quantize": "nf4"},
        "4-bit weights would stay whole on every device, so nothing would be split",
        "drop --quantize, or launch with --multi_gpu (DDP)",
    ),
    Refusal(
        "--mixed_precision fp16 under FSDP2",
        {"engine": FSDP2, "mixed_precision": "fp16"},
        "accelerate unscales the gradients twice there when a part of them is clipped",
        "use --mixed_precision bf16 or no",
    ),
    # how it is split
    Refusal(
        "FSDP_OFFLOAD_PARAMS",
        {"engine": FSDP2, "offload": True},
        "held-out rows would be sent to the CPU, where the weights wait, and not to the device",
        "set it to false, or launch with --multi_gpu and --quantize nf4 if memory is short",
    ),
    Refusal(
        "FSDP_ACTIVATION_CHECKPOINTING",
        {"engine": FSDP2, "activation_checkpointing": True},
        "it renames the layers, which a checkpoint of another launch would then not fit",
        "set it to false and add --gradient_checkpointing, which does the same",
    ),
    Refusal(
        "FSDP_IGNORED_MODULES",
        {"engine": FSDP2, "ignored_modules": True},
        "FSDP2 is told already to leave whole exactly what is trained",
        "unset it",
    ),
    Refusal(
        "a dynamo backend under FSDP2",
        {"engine": FSDP2, "compiled": True},
        "the compiled model would be split, and held-out rows go through the model in it",
        "set ACCELERATE_DYNAMO_BACKEND to no",
    ),
    Refusal(
        "SIZE_BASED_WRAP under FSDP2",
        {"engine": FSDP2, "size_based_wrap": True},
        "it could take a single layer apart from the adapters on it",
        "set FSDP_AUTO_WRAP_POLICY to TRANSFORMER_BASED_WRAP",
    ),
)
"""Every way to launch that is refused, with the reason; all other combinations of FSDP2 with a
method, an ablation of Bi-LoRA, DoRA, an optimizer, averaging or recording are right.
"""


def check(cfg: Any, accelerator: Accelerator, *, images: bool) -> None:
    """Refuse engines and combinations that would be wrong; call it before a model is loaded.

    Under FSDP2 it also asks every process to read the model's file: accelerate's
    ``FSDP_CPU_RAM_EFFICIENT_LOADING`` hands out empty weights, on which no adapter can be put.

    Args:
        cfg: the command line's configuration.
        images: whether an image model is to be trained.

    Raises:
        UserError: one sentence with the reason and what to use instead.
    """
    values = {**cfg.to_dict(), **launch(accelerator), "task": "image" if images else "text"}
    for entry in REFUSED:
        if entry.holds(values):
            raise UserError(entry.sentence)
    plugin: Any = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # Transformers reads it there
        logger.info("every process reads the weights, whatever FSDP_CPU_RAM_EFFICIENT_LOADING says")


def launch(accelerator: Accelerator) -> dict[str, Any]:
    """How accelerate was launched, as far as `REFUSED` asks."""
    kind = accelerator.distributed_type
    values = {
        "engine": FSDP2 if accelerator.is_fsdp2 else ENGINES.get(kind, DDP),
        "parallelism_config": accelerator.parallelism_config is not None,
        "use_fsdp": os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true",
        "cpu": kind == DistributedType.MULTI_CPU,
    }
    if not accelerator.is_fsdp2:
        return values
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    state: Any = accelerator.state
    plugin = state.fsdp_plugin
    return values | {
        "offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing": bool(plugin.activation_checkpointing),
        "compiled": state.dynamo_plugin.backend != DynamoBackend.NO,
        "ignored_modules": plugin.ignored_modules is not None,
        "size_based_wrap": plugin.auto_wrap_policy is size_based_auto_wrap_policy,
    }
