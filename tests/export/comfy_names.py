"""ComfyUI's names for the layers that get adapters by default, by diffusers' names.

The names are from ComfyUI's comfy/lora.py and comfy/utils.py of 2026; test_comfyui.py compares them
with its code. ComfyUI reads the keys "transformer.LAYER.lora_A.weight" and "...lora_B.weight" of a
LoRA file and changes the weight that `NAMES` lists for LAYER. "#" is a number, and "[i]" is the
i-th part of a weight that fuses several of diffusers' layers. Lumina 2 is missing, since ComfyUI
has no such names for it.
"""

import re

_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")
_IMAGE = ("to_q", "to_k", "to_v")


def _fused(ours: str, names: tuple[str, ...], theirs: str) -> dict[str, str]:
    """Return the names of diffusers' layers that ComfyUI fuses into one weight."""
    return {f"{ours}.{name}": f"{theirs}[{part}]" for part, name in enumerate(names)}


_BLOCK, _SINGLE = "transformer_blocks.#.attn", "single_transformer_blocks.#.attn"
_JOINT, _DOUBLE = "joint_blocks.#", "double_blocks.#"

_FLUX = {
    **_fused(_BLOCK, _IMAGE, f"{_DOUBLE}.img_attn.qkv"),
    **_fused(_BLOCK, _TEXT, f"{_DOUBLE}.txt_attn.qkv"),
    f"{_BLOCK}.to_out.0": f"{_DOUBLE}.img_attn.proj",
    f"{_BLOCK}.to_add_out": f"{_DOUBLE}.txt_attn.proj",
}
_QWEN = (*_IMAGE, *_TEXT, "to_out.0", "to_add_out")


def _z_image(block: str) -> dict[str, str]:
    """Return the names of the attention layers in one kind of Z-Image block."""
    names = _fused(f"{block}.attention", _IMAGE, f"{block}.attention.qkv")
    names[f"{block}.attention.to_out.0"] = f"{block}.attention.out"
    return names


def _krea(ours: str, theirs: str) -> dict[str, str]:
    """Return the names of the attention layers in one kind of Krea 2 block."""
    return {
        f"{ours}.attn.to_q": f"{theirs}.attn.wq",
        f"{ours}.attn.to_k": f"{theirs}.attn.wk",
        f"{ours}.attn.to_v": f"{theirs}.attn.wv",
        f"{ours}.attn.to_gate": f"{theirs}.attn.gate",
        f"{ours}.attn.to_out.0": f"{theirs}.attn.wo",
    }


# Class of the transformer in diffusers -> diffusers' name of a layer -> ComfyUI's name
NAMES: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": {
        **_fused(_BLOCK, _IMAGE, f"{_JOINT}.x_block.attn.qkv"),
        **_fused(_BLOCK, _TEXT, f"{_JOINT}.context_block.attn.qkv"),
        **_fused("transformer_blocks.#.attn2", _IMAGE, f"{_JOINT}.x_block.attn2.qkv"),
        f"{_BLOCK}.to_out.0": f"{_JOINT}.x_block.attn.proj",
        f"{_BLOCK}.to_add_out": f"{_JOINT}.context_block.attn.proj",
        "transformer_blocks.#.attn2.to_out.0": f"{_JOINT}.x_block.attn2.proj",
    },
    "FluxTransformer2DModel": _FLUX | _fused(_SINGLE, _IMAGE, "single_blocks.#.linear1"),
    "Flux2Transformer2DModel": {
        **_FLUX,
        f"{_SINGLE}.to_qkv_mlp_proj": "single_blocks.#.linear1",
        f"{_SINGLE}.to_out": "single_blocks.#.linear2",
    },
    "QwenImageTransformer2DModel": {f"{_BLOCK}.{name}": f"{_BLOCK}.{name}" for name in _QWEN},
    "ZImageTransformer2DModel": {
        **_z_image("layers.#"),
        **_z_image("context_refiner.#"),
        **_z_image("noise_refiner.#"),
    },
    "Krea2Transformer2DModel": {
        **_krea("transformer_blocks.#", "blocks.#"),
        **_krea("text_fusion.layerwise_blocks.#", "txtfusion.layerwise_blocks.#"),
        **_krea("text_fusion.refiner_blocks.#", "txtfusion.refiner_blocks.#"),
    },
}
_NUMBER = re.compile(r"(?<=s\.)\d+|(?<=refiner\.)\d+")


def place(transformer: str, layer: str) -> tuple[str, int]:
    """Return ComfyUI's layer for one of diffusers' layers, and the part of its weight."""
    theirs, _, part = NAMES[transformer][_NUMBER.sub("#", layer)].partition("[")
    for number in _NUMBER.findall(layer):
        theirs = theirs.replace("#", number, 1)
    return theirs, int(part.rstrip("]") or 0)


# Patterns of ComfyUI's names for SDXL's layers in a LoRA file. Each key ends with one of
# `SDXL_ENDINGS`.
_PLACE = r"(down_blocks_\d+|up_blocks_\d+|mid_block)_(attentions|resnets)_\d+"
_BLOCK_SDXL = r"transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_0_proj|ff_net_2)"
SDXL_KEYS = (
    rf"lora_unet_{_PLACE}_({_BLOCK_SDXL}|proj_in|proj_out|conv1|conv2|conv_shortcut|time_emb_proj)",
    r"lora_unet_(down_blocks_\d+_downsamplers|up_blocks_\d+_upsamplers)_0_conv",
    r"lora_unet_(conv_in|conv_out|(time|add)_embedding_linear_[12])",
    r"lora_unet_(time_embed_[02]|label_emb_0_[02]|input_blocks_0_0|out_2)",  # ComfyUI's own names
    r"lora_te[12]_text_model_encoder_layers_\d+_(mlp_fc[12]|self_attn_(q|k|v|out)_proj)",
    "lora_te2_text_projection",
)
SDXL_ENDINGS = (".lora_up.weight", ".lora_down.weight", ".alpha", ".dora_scale")
