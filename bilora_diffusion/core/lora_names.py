"""Names of LoRA files, of the adapters in them and of the models that have adapters.

The file for diffusers has a fixed name; the kohya file is named after the run folder.
Cheap to import (no torch).
"""

from __future__ import annotations

import re
from pathlib import Path

# Names of the adapters in PEFT; "default" is PEFT's default.
PRIMARY = "default"
AUXILIARY = "auxiliary"
# Initial primary that was subtracted from the base weights; inactive, not trained.
INITIAL = "initial"
# Adapters of additional LoRA files, frozen and not exported: ASSISTANT is active in training,
# SAMPLING while images are generated.
ASSISTANT = "assistant"
SAMPLING = "sampling"
FROZEN = (ASSISTANT, SAMPLING)

# Component names of pipelines; a pipeline has one denoiser.
DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2")
# Components that can have adapters in a LoRA file.
COMPONENTS = DENOISERS + ENCODERS

FORMATS = ("diffusers", "kohya", "peft")
# A base model with the adapter merged, in addition to the LoRA formats.
MERGED = "merged"
# The two files of a PEFT adapter folder.
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Metadata key of PEFT's configurations in diffusers' files.
ADAPTER_METADATA = "lora_adapter_metadata"
# Name of the file for diffusers.
FILE_NAME = "pytorch_lora_weights.safetensors"

# Maximum bytes of a file stem; file systems allow 255 bytes with all suffixes.
_LONGEST_STEM = 180
# Characters that Windows forbids in file names, or that end a name in A1111's <lora:name:1>.
_UNSAFE = re.compile(r'[<>:"/\\|?*,\x00-\x1f\x7f]')
# Names that PEFT, Transformers and diffusers give to files of their own.
_RESERVED_STEMS = ("adapter_model", "model", "diffusion_pytorch_model")


def kohya_file_name(folder: str | Path, step: int | None = None) -> str:
    """File name of a run's export in kohya's format: "runs/icons" -> "icons.safetensors".

    It is safe in any file system and in a web UI's prompt. "-kohya" is added to a name that PEFT or
    diffusers give to their own files, or whose suffix diffusers would mistake for its own.

    Args:
        folder: the run folder, which need not exist.
        step: step of the checkpoint that the file is made from; None for the end of the run.
    """
    # Half a surrogate pair, which a folder's name can have, becomes a question mark.
    folder_name = Path(folder).resolve().name.encode("utf-8", "replace").decode("utf-8")
    stem = _UNSAFE.sub("_", folder_name).strip(" .") or "lora"
    # The cut may split a multi-byte character, which is then dropped.
    stem = stem.encode("utf-8")[:_LONGEST_STEM].decode("utf-8", "ignore")
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
    """The name of the workflow with guidance from the base model, "icons.base.comfy.json"."""
    return f"{Path(kohya_file_name(folder)).stem}.base.comfy.json"
