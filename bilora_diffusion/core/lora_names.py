"""Names of LoRA files and of the adapters in them; importing this costs nothing.

The files of a run: diffusers' by its fixed name, kohya's after the run.
"""

from __future__ import annotations

import re
from pathlib import Path

PRIMARY = "default"
AUXILIARY = "auxiliary"
INITIAL = "initial"
"""First values of a primary that were taken out of the base weights; never acts, never trained."""
DENOISERS = ("unet", "transformer")
"""Of pipelines, which have one of them."""
ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = (*DENOISERS, *ENCODERS)
"""Models of a pipeline that files hold adapters of."""
FORMATS = ("diffusers", "kohya", "peft")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of PEFT's folder."""
ADAPTER_METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps PEFT's configurations in a file."""
FILE_NAME = "pytorch_lora_weights.safetensors"
KOHYA_FILE_NAME_BEFORE = "pytorch_lora_weights_kohya.safetensors"
"""Of kohya's file in folders of versions that did not name it after the run."""

_LONGEST = 180  # bytes of a name without its ending; file systems take 255 with all endings
# What Windows has in no file name, and what ends a name in A1111's <lora:name:1>.
_UNSAFE = re.compile(r'[<>:"/\\|?*,\x00-\x1f\x7f]')
_RESERVED_STEMS = ("adapter_model", "model", "diffusion_pytorch_model")


def kohya_file_name(folder: str | Path, step: int | None = None) -> str:
    """The name of kohya's file for a run: that of its folder, "runs/icons" -> "icons.safetensors".

    It is safe in any file system and in a web UI's prompt. A name that PEFT or diffusers give to
    files of their own, or that diffusers would load for its own by the ending, ends in "-kohya".

    Args:
        folder: the run folder, which need not exist.
        step: of the checkpoint that the file is made from; by default it is the end of the run.
    """
    text = Path(folder).resolve().name.encode("utf-8", "replace").decode("utf-8")
    stem = _UNSAFE.sub("_", text).strip(" .") or "lora"
    stem = stem.encode("utf-8")[:_LONGEST].decode("utf-8", "ignore")
    if step is not None:
        return f"{stem}-step-{step}.safetensors"
    name = f"{stem}.safetensors"
    if name.lower().endswith(FILE_NAME) or stem.lower() in _RESERVED_STEMS:
        name = f"{stem}-kohya.safetensors"
    return name


def workflow_file_name(folder: str | Path) -> str:
    """The name of a run's workflow for ComfyUI, "runs/icons" -> "icons.comfy.json"."""
    return f"{Path(kohya_file_name(folder)).stem}.comfy.json"


def base_workflow_file_name(folder: str | Path) -> str:
    """The name of its workflow with guidance from the base model, "icons.base.comfy.json"."""
    return f"{Path(kohya_file_name(folder)).stem}.base.comfy.json"
