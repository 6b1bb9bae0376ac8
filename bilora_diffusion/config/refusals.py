"""What does not go together, why, and what to do instead: the one table of it.

Options with each other and with the device, and ways to launch (`launches`). It is asked with a
mapping of facts: option values by name, and what `conditions.FACTS` names. Command lines, launches
and trainers refuse what stands here, the contract tests leave it out, and docs/options.md shows it
(``python -m docs.make``).

An option that the chosen method does not read stands without complaint, so that runs which differ
only in ``--method`` can share a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..choices import AUTO
from ..errors import UserError
from .conditions import (
    ABSENT,
    GIVEN,
    Refusal,
    above,
    other_than,
    refusal,
    several,
)
from .data_refusals import OF_DATA
from .launches import FSDP2, LAUNCHES
from .optimizer_refusals import OF_OPTIMIZERS

FLOWS = other_than("StableDiffusionXLPipeline")

_NEEDS_ADAPTERS = {
    "use_dora": (True, "there is no adapter whose magnitude could be trained apart"),
    "init_lora_weights": (("gaussian", "pissa", "lora-ga"), "there is no adapter to start"),
    "lora_dropout": (above(0), "there is no adapter to put dropout in front of"),
    "output_kohya_format": (
        True,
        "kohya's format is for adapters, and this method leaves whole models",
    ),
    "log_dynamics": (True, "there are no factors whose course could be recorded"),
}

_BY_THE_LOSS = {"early_stopping_patience": GIVEN, "keep_best": True}
_NOTHING_HELD_OUT = {
    "validation_dataset": {"validation_dataset": ABSENT},
    "validation_file": {"task": ABSENT, "validation_file": ABSENT},
}

_WITHOUT_AUTO = (
    (
        "ball",
        "none",
        "there is no ball whose radius could set itself",
        "use `--ball global` or `per-layer`",
    ),
    (
        "auxiliary_direction",
        "descent",
        "an auxiliary that descends does not raise the loss",
        "drop `--auxiliary_direction` or give `--rho` a number",
    ),
)

_WITH_SEVERAL = (
    ("ball", ("none", "per-layer"), "each has one ball over all layers", "use `--ball global`"),
    (
        "optimizer",
        "prodigy",
        "it counts steps for all weights, also for the auxiliaries that a step does not see",
        "use `--optimizer adamw`",
    ),
    (
        "trainer_processes",
        above(1),
        "its DDP would average the gradients of different samples' auxiliaries",
        "train in one process, or by the scripts of this project",
    ),
    ("packing", True, "a packed row holds several samples", "drop `--packing`"),
    ("compile", True, "compiled blocks know one auxiliary for all rows", "drop `--compile`"),
    ("log_dynamics", True, "it records one auxiliary", "drop `--log_dynamics`"),
    (
        "engine",
        FSDP2,
        "the rows of a process would gather weights that others do not ask for",
        "launch with `--multi_gpu` (DDP)",
    ),
)

REFUSED: tuple[Refusal, ...] = (
    *OF_DATA,
    # weights in 4 bits
    refusal(
        "quantized weights can't be trained",
        "drop `--quantize` or use `--method bilora`, `lora` or another with adapters",
        method="full",
        quantize="nf4",
    ),
    refusal(
        "its noise is added to the base weights, and 4 bits can't hold it",
        "drop `--quantize` or use `--method bilora`, `lora-sam` or another that adds no noise",
        method="flat-lora",
        quantize="nf4",
    ),
    refusal(
        "this start is taken out of the base weights, which would be rounded to 4 bits once more",
        "drop `--quantize` or use `--init_lora_weights default` or `gaussian`",
        init_lora_weights=("pissa", "lora-ga"),
        quantize="nf4",
    ),
    *(
        refusal(
            reason, f"drop `--{name}` or use another method", **{"method": "full", name: wanted}
        )
        for name, (wanted, reason) in _NEEDS_ADAPTERS.items()
    ),
    refusal(
        "its steepest step is that of a weight without magnitudes of its own",
        "drop `--use_dora` or use `--method lora-sam`",
        method="efm-lora",
        use_dora=True,
    ),
    # precision, loss, rates
    refusal(
        "the gradients of its two passes would have to be unscaled twice by one loss scaler",
        "use `--mixed_precision bf16` or `no`",
        method=("lora-sam", "lora-looksam"),
        mixed_precision="fp16",
    ),
    refusal("it does not work there", "use fp16 or no", mixed_precision="bf16", device="mps"),
    refusal("it needs a GPU", "use bf16 or no", mixed_precision="fp16", device="cpu"),
    refusal(
        "it needs CUDA",
        "drop it",
        enable_xformers_memory_efficient_attention=True,
        device=other_than("cuda"),
    ),
    refusal(
        "min-SNR weights are not defined for it, which weighs the noise levels itself",
        "drop one of the two",
        do_edm_style_training=True,
        snr_gamma=above(0),
    ),
    *(
        refusal(
            "it predicts the velocity of a flow, which has no signal-to-noise ratios",
            "drop it, or weigh by `--weighting_scheme`",
            **{name: wanted, "pipeline": FLOWS},
        )
        for name, wanted in {"snr_gamma": above(0), "do_edm_style_training": True}.items()
    ),
    refusal(
        "kohya's format is written for Stable Diffusion XL alone",
        "drop it or give `--no_output_kohya_format`; ComfyUI reads the file for diffusers of most"
        " other models (docs/files.md)",
        output_kohya_format=True,
        pipeline=FLOWS,
    ),
    refusal(
        "its text encoders are large and serve once, before training",
        "drop it",
        train_text_encoder=True,
        pipeline=FLOWS,
    ),
    refusal(
        "both say how the rate rises", "give only one", warmup_ratio=GIVEN, lr_warmup_steps=GIVEN
    ),
    *OF_OPTIMIZERS,
    # Bi-LoRA's ablations
    refusal(
        "an auxiliary that never leaves zero does nothing",
        "use `--method lora`",
        method="bilora",
        auxiliary_learning_rate=0,
    ),
    *(
        refusal(reason, instead, method="bilora", rho=AUTO, **{name: values})
        for name, values, reason, instead in _WITHOUT_AUTO
    ),
    *(
        refusal(reason, instead, method="bilora", auxiliaries=several(), **{name: values})
        for name, values, reason, instead in _WITH_SEVERAL
    ),
    # when to stop
    *(
        refusal("the search says when to stop", "drop one of them", **{name: wanted, "fit": True})
        for name, wanted in _BY_THE_LOSS.items()
    ),
    *(
        refusal(
            "there is no held-out loss to go by",
            f"add `--{place}`, or drop it and use `--fit`",
            **{name: wanted, **absent},
        )
        for name, wanted in _BY_THE_LOSS.items()
        for place, absent in _NOTHING_HELD_OUT.items()
    ),
    *(
        refusal(
            "the held-out loss would be known at the start and the end only",
            "say how often to measure it, for example `--validation_loss_steps 50`",
            **{name: wanted, "validation_loss_steps": 0},
        )
        for name, wanted in _BY_THE_LOSS.items()
    ),
    refusal(
        "its runs would change the weights that all of them share",
        "use `--method bilora`, `lora` or another with adapters",
        fit=True,
        method="full",
    ),
    refusal(
        "compiled blocks know the adapters that they were compiled with",
        "drop `--compile`",
        fit=True,
        compile=True,
    ),
    # the run
    refusal("a run needs a folder", "name it", output_dir=ABSENT),
    refusal(
        "one continues what the other deletes",
        "drop one of them",
        resume_from_checkpoint=GIVEN,
        overwrite_output_dir=True,
    ),
    refusal(
        "the token could leak to the tracker",
        "drop it and run `hf auth login`",
        hub_token=GIVEN,
        report_to=("wandb", "all"),
    ),
    *LAUNCHES,
)


def refused(facts: Mapping[str, Any]) -> Refusal | None:
    """The first entry that holds for these facts, or None; unknown facts are not refused."""
    return next((entry for entry in REFUSED if entry.holds(facts)), None)


def check(facts: Mapping[str, Any]) -> None:
    """Refuse what does not go together.

    Raises:
        UserError: one sentence that names the values, the reason and the fix.
    """
    if (entry := refused(facts)) is not None:
        raise UserError(entry.sentence(facts))
