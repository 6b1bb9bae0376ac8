"""Flags that diffusers' DreamBooth scripts for flow-matching models have beside those of the one
for SDXL, and what they mean here. Those that are refused stand in ``config.foreign``.
"""

from __future__ import annotations

from .diffusers_flags import Flag, flag

FLOW_FLAGS: tuple[Flag, ...] = (
    flag("lora_alpha", 4, "Twice the rank where it is not given, as in the paper."),
    flag(
        "lora_layers",
        None,
        "By default the projections of attention, those for the text included; its scripts name"
        " others for some models.",
    ),
    flag("max_sequence_length", 512, "That script's default of each model."),
    flag(
        "guidance_scale",
        3.5,
        "Told to a model that has an embedding of guidance; a line says so where it has none.",
    ),
    flag("weighting_scheme", "none", "That script's default of each model (SD3 `logit_normal`)."),
    flag("logit_mean", 0.0),
    flag("logit_std", 1.0),
    flag("mode_scale", 1.29),
    flag(
        "precondition_outputs",
        1,
        "Of all flow models, and 0 where it is not given, in SD3 too.",
    ),
    flag(
        "aspect_ratio_buckets", None, "`auto` chooses some; all images of a step are of one size."
    ),
    flag(
        "caption_dropout",
        0.0,
        "Drawn for each image of a batch, of any model. What stands for a dropped caption is what"
        " guidance leads away from: zeros for SDXL base, for Lumina 2 the empty prompt without its"
        " system prompt; there, and in kohya's scripts, it is an empty caption.",
    ),
    flag("cache_latents", False, "The flag alone, or before `yes`, `no` or `auto`, the default."),
    flag(
        "offload",
        False,
        "Of the autoencoder. Frozen text encoders leave the device anyway once all prompts are"
        " embedded, before training; those of flow models are then let go of.",
    ),
    flag(
        "bnb_quantization_config_path",
        None,
        "A file that asks for NF4 is `--quantize nf4`, which quantizes its constants too; any other"
        " is refused.",
    ),
    flag(
        "validation_num_inference_steps",
        8,
        "25 by default, and of distilled models as few as they take; there of"
        " `--validation_model_path` alone.",
    ),
    flag(
        "validation_guidance_scale",
        0.0,
        "What is usual for the model by default; there of `--validation_model_path` alone.",
    ),
    flag(
        "final_validation_prompt",
        None,
        "Passed over beside `--validation_prompt`, as there; with `--validation_epochs` its images"
        " are made during training too.",
    ),
    flag("skip_final_inference", False),
    flag(
        "upcast_before_saving",
        False,
        "Without effect: what is trained is kept and saved in 32 bits.",
    ),
)
