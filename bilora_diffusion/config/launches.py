"""Which ways to launch training are refused: engines of accelerate, and trainers of Transformers.

DDP trains everything, FSDP2 adapters of text models (see ``train.sharding``). All combinations of
FSDP2 with a method, an ablation of Bi-LoRA, DoRA, an optimizer, averaging or recording that do not
stand here are right. The facts of a launch are read here, those of a trainer by
``integrations.checks``.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from . import machine
from .conditions import GIVEN, Refusal, above, other_than, refusal

FSDP2, DDP = "FSDP2", "DDP"
_OR_DDP = "or launch with `--multi_gpu` (DDP)"

LAUNCHES: tuple[Refusal, ...] = (
    refusal(
        "each process would train on its own",
        "start several processes with accelerate launch or torchrun",
        local_rank=above(0),
        alone=True,
    ),
    refusal(
        "only DDP and FSDP2 leave the adapters whole, clip their gradients before the optimizer's"
        " step and deal each row to one process",
        "set fsdp_version to 2 for a text model too large for one device, or launch with"
        " `--multi_gpu` (DDP)",
        engine=other_than(DDP, FSDP2),
    ),
    # what is trained
    refusal(
        "text encoders and autoencoder work beside the UNet in passes that FSDP2 knows nothing of",
        "launch with `--multi_gpu` (DDP), or add `--quantize nf4` if memory is short",
        engine=FSDP2,
        modality="image",
    ),
    refusal(
        "what is trained stays whole on every device, and here that is all of the model",
        f"use `--method bilora`, `lora` or another with adapters, {_OR_DDP}",
        method="full",
        engine=FSDP2,
    ),
    refusal(
        "its noise is scaled by the norms of the base's rows, of which a device holds a part",
        f"use `--method bilora` or `lora-sam`, {_OR_DDP}",
        method="flat-lora",
        engine=FSDP2,
    ),
    refusal(
        "this start is computed from whole base weights and taken out of them",
        f"use `--init_lora_weights default` or `gaussian`, {_OR_DDP}",
        init_lora_weights=("pissa", "lora-ga"),
        engine=FSDP2,
    ),
    refusal(
        "quantized weights would stay whole on every device, so nothing would be split",
        f"drop `--quantize`, {_OR_DDP}",
        quantize="nf4",
        engine=FSDP2,
    ),
    refusal(
        "accelerate unscales the gradients twice there when a part of them is clipped",
        "use `--mixed_precision bf16` or `no`",
        mixed_precision="fp16",
        engine=FSDP2,
    ),
    refusal(
        "its runs share a model that is whole in each process",
        "launch with `--multi_gpu` (DDP)",
        fit=True,
        engine=FSDP2,
    ),
    refusal(
        "it splits more than the frozen layers, puts them elsewhere or renames them",
        "unset it (in place of checkpointing there is `--gradient_checkpointing`)",
        fsdp_setting=GIVEN,
        engine=FSDP2,
    ),
    refusal(
        "the whole model would be compiled around the compiled blocks",
        "set ACCELERATE_DYNAMO_BACKEND to no, or drop `--compile`",
        compile=True,
        compiled=True,
    ),
    # trainers of Transformers and TRL
    refusal(
        "it shards or replaces the parameters, so the norm of the auxiliary would be of a part",
        "train on one GPU or with DDP (torchrun)",
        trainer_engine=GIVEN,
    ),
    refusal("adapters would be lost when training starts", "give it model=...", model_init=True),
    refusal(
        "it keeps weights of its own, which the projection onto the ball would miss",
        'use an AdamW, such as optim="adamw_torch"',
        optim=GIVEN,
    ),
)


def facts() -> dict[str, Any]:
    """How accelerate was launched, by the names of `conditions.FACTS`: from the variables that its
    launcher sets and it reads.
    """

    def word(name: str) -> str:
        return os.environ.get(name, "no").upper()

    compiled = word("ACCELERATE_DYNAMO_BACKEND") not in ("", "NO")
    engine, bad = DDP, dict[str, bool]()
    if machine.is_on("ACCELERATE_USE_FSDP"):
        engine = "FSDP on CPUs" if machine.device_type() == "cpu" else "FSDP"
        if engine == "FSDP" and os.environ.get("FSDP_VERSION") == "2":
            names = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
            engine, bad = FSDP2, {name: machine.is_on(name) for name in names}
            bad |= {
                "FSDP_IGNORED_MODULES": "FSDP_IGNORED_MODULES" in os.environ,
                "SIZE_BASED_WRAP": word("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP",
                "ACCELERATE_DYNAMO_BACKEND": compiled,
            }
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        if machine.is_on(f"ACCELERATE_USE_{name}"):
            engine = name
    if importlib.util.find_spec("torch_xla"):
        engine = "XLA"
    setting = next((name for name, given in bad.items() if given), None)
    alone = "LOCAL_RANK" not in os.environ
    return {"engine": engine, "fsdp_setting": setting, "compiled": compiled, "alone": alone}
