"""Flags of diffusers' DreamBooth scripts that are not here: why, and what to use instead."""

from __future__ import annotations

_TOO_LARGE = "drop it, and add `--quantize nf4` where a text encoder is too large for the device"
_NO_FOURTH = ("no model here has a fourth text encoder", "drop it")

FOREIGN: dict[str, tuple[str, str]] = {
    "use_aspect_ratio_buckets": (
        "the option that chooses sizes turns them on",
        "use `--aspect_ratio_buckets auto`, or give it sizes",
    ),
    "do_fp8_training": (
        "nothing is computed in 8 bits here",
        "use `--mixed_precision bf16`, with `--quantize nf4` where memory is short",
    ),
    "enable_npu_flash_attention": (
        "attention is that of PyTorch or of xFormers",
        "drop it, or use `--enable_xformers_memory_efficient_attention`",
    ),
    "fsdp_text_encoder": ("text encoders serve once, before training", _TOO_LARGE),
    "lora_blocks": (
        "layers are chosen by their names",
        "use `--lora_layers`, such as"
        " transformer_blocks.12.attn.to_k,transformer_blocks.12.attn.to_v",
    ),
    "pretrained_text_encoder_4_name_or_path": _NO_FOURTH,
    "pretrained_tokenizer_4_name_or_path": _NO_FOURTH,
    "remote_text_encoder": ("prompts are embedded on this machine", _TOO_LARGE),
    "system_prompt": ("Lumina 2 is told the system prompt that its pipeline has", "drop it"),
    "text_encoder_out_layers": (
        "the text encoder's layers are those that the pipeline itself reads",
        "drop it",
    ),
    "validation_model_path": (
        "images are made by the model that is trained",
        "drop it, and let the other model's pipeline read the run's file by `load_lora_weights`",
    ),
}
"""By its name without dashes: a clause that follows "since", and what to do, with options in
backquotes."""
