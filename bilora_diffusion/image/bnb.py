"""A file of settings for bitsandbytes, as diffusers' scripts take it, read as `--quantize`."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..files import read_text

FLAG = "--bnb_quantization_config_path"
MOST_BYTES = 100_000


def quantization(path: str) -> str:
    """ "nf4", where the file asks for 4-bit NormalFloats.

    It may ask for double quantization or not: ``--quantize nf4`` always quantizes twice. What the
    arithmetic is in follows ``--mixed_precision``, as in diffusers' scripts.

    Raises:
        UserError: no JSON object, or one that asks for something else.
    """
    shown = f'{FLAG} "{path}"'
    try:
        asked = json.loads(read_text(Path(path).expanduser(), shown, MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown} is no JSON: correct it, or use --quantize nf4.") from error
    if not isinstance(asked, dict):
        raise UserError(f"{shown} is no JSON object: correct it, or use --quantize nf4.")
    kind = asked.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if asked.get("load_in_4bit") is not True or kind != "nf4" or asked.get("load_in_8bit"):
        raise UserError(
            f"{shown} asks for something else than NF4, for which alone bitsandbytes is used: write"
            ' load_in_4bit true and bnb_4bit_quant_type "nf4" into it, or use --quantize nf4.'
        )
    if asked.get("llm_int8_skip_modules"):
        raise UserError(
            f"{shown} names llm_int8_skip_modules, and which layers stay as they are is decided"
            " here: take that out, or use --quantize nf4 instead."
        )
    return "nf4"
