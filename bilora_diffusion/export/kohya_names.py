"""Module names from the flattened ones of kohya's files: "mid_block_0_proj_in" has dots again.

Only names that diffusers and Transformers have for SDXL's UNet and text encoders are known: their
parts that hold an underscore are listed here, and a test holds the list to the models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from ..errors import UserError

# Parts of module names that hold an underscore.
_WORDS = frozenset(
    """down_blocks mid_block up_blocks transformer_blocks to_q to_k to_v to_out proj_in proj_out
    conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2
    text_model text_projection self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2
    final_layer_norm token_embedding position_embedding""".split()  # noqa: SIM905
)
_LONGEST = 1 + max(word.count("_") for word in _WORDS)
# SDXL's original ("sgm") names, which kohya's own scripts write.
_SGM_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_SGM_PARTS = {
    "input_blocks": "down_blocks",
    "middle_block": "mid_block",
    "output_blocks": "up_blocks",
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "downsamplers_0_op": "downsamplers_0_conv",
}
_SGM_BLOCK = re.compile(r"(?:input_blocks_[1-8]|middle_block|output_blocks_[0-8])_[0-2]_")
_N = r"\d{1,2}"
_PLACE = r"(?:(?:down_blocks\.[0-3]|mid_block)\.KIND\.[01]|up_blocks\.[0-3]\.KIND\.[0-2])"
_UNET = re.compile(
    rf"{_PLACE.replace('KIND', 'attentions')}\.(?:proj_in|proj_out|transformer_blocks\.{_N}\."
    r"(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
    rf"|{_PLACE.replace('KIND', 'resnets')}\.(?:conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|down_blocks\.[0-3]\.downsamplers\.0\.conv|up_blocks\.[0-3]\.upsamplers\.0\.conv"
    r"|(?:time|add)_embedding\.linear_[12]|conv_in|conv_out"
)
_ENCODER = re.compile(
    rf"text_projection|(?:text_model\.)?(?:embeddings\.(?:token|position)_embedding"
    rf"|encoder\.layers\.{_N}\.(?:self_attn\.(?:[qkv]_proj|out_proj|to_[qkv]|to_out)|mlp\.fc[12]))"
)


def with_dots(flat: str) -> str:
    """A module's name from its flattened one: the longest known part comes first."""
    pieces, parts, at = flat.split("_"), [], 0
    while at < len(pieces):
        size = next(
            (
                size
                for size in range(_LONGEST, 1, -1)
                if "_".join(pieces[at : at + size]) in _WORDS and at + size <= len(pieces)
            ),
            1,
        )
        parts.append("_".join(pieces[at : at + size]))
        at += size
    return ".".join(parts)


def unet_names(flats: Iterable[str]) -> dict[str, str]:
    """Module names of diffusers' UNet for flattened names, of diffusers or SDXL's original ones.

    Raises:
        UserError: a name that SDXL does not have, or both kinds of names.
    """
    names = list(dict.fromkeys(flats))
    blocks = [name for name in names if _in_sgm_block(name)]
    found = {name: _SGM_WHOLE.get(name, name) for name in names if name not in blocks}
    if blocks and any("down_blocks" in name or "up_blocks" in name for name in names):
        raise UserError(
            f"The file names layers as SDXL does ({blocks[0]}) and as diffusers does; give a file"
            " with names of one kind."
        )
    return _existing(found | _from_blocks(blocks), _UNET, "SDXL's UNet")


def encoder_names(flats: Iterable[str]) -> dict[str, str]:
    """Module names of CLIP's text encoders for flattened ones.

    Raises:
        UserError: a name that they do not have.
    """
    return _existing({name: name for name in flats}, _ENCODER, "CLIP's text encoders")


def _existing(flats: Mapping[str, str], known: re.Pattern[str], model: str) -> dict[str, str]:
    """The names of the file with those of the modules."""
    names = {name: with_dots(flat) for name, flat in flats.items()}
    if odd := [name for name, dotted in names.items() if not known.fullmatch(dotted)]:
        raise UserError(
            f"{odd[0]} is no layer of {model}, for which alone kohya's names are known; give a"
            " file in diffusers' or PEFT's format."
        )
    return names


def _in_sgm_block(name: str) -> bool:
    return bool(_SGM_BLOCK.match(name))


def _from_blocks(names: list[str]) -> dict[str, str]:
    """Flattened diffusers' names of what lies in the original UNet's blocks."""
    if not names:
        return {}
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    sdxl = SimpleNamespace(layers_per_block=2)
    counted = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{n}": n for n in names}, sdxl)
    made = {}
    for key, name in counted.items():
        flat = key.removeprefix("lora_unet_")
        for old, new in _SGM_PARTS.items():
            flat = flat.replace(old, new)
        made[name] = flat
    return made
