"""Names of LoRA files, of their adapters and of the pipeline components that have adapters.

The file for diffusers has a fixed name; the kohya file is named after the run folder. This module
is fast to import, since it does not import torch.
"""

from __future__ import annotations

import re
from pathlib import Path

# Names of the adapters in PEFT; "default" is PEFT's default name.
PRIMARY = "default"
AUXILIARY = "auxiliary"
# Copy of the initial primary, which was subtracted from the base weights; inactive, not trained.
INITIAL = "initial"
# Frozen adapters of additional LoRA files, which are not exported. ASSISTANT is active during
# training, SAMPLING while images are generated.
ASSISTANT = "assistant"
SAMPLING = "sampling"
FROZEN = (ASSISTANT, SAMPLING)

# Names of pipeline components; a pipeline has one denoiser.
DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2")
# Components that can have adapters in a LoRA file.
COMPONENTS = DENOISERS + ENCODERS

FORMATS = ("diffusers", "kohya", "peft")
# Another export format: the base model with the adapter merged into it.
MERGED = "merged"
# The two files of a PEFT adapter folder.
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Metadata key of the PEFT configurations in a file for diffusers.
ADAPTER_METADATA = "lora_adapter_metadata"
# Name of the file for diffusers.
FILE_NAME = "pytorch_lora_weights.safetensors"

# Maximum length of a file stem in bytes; file systems allow 255 including all suffixes.
_LONGEST_STEM = 180
# Characters that Windows forbids in file names, and the comma, which separates names in A1111's
# list of LoRA hashes.
_UNSAFE = re.compile(r'[<>:"/\\|?*,\x00-\x1f\x7f]')
# Stems that PEFT, Transformers and diffusers use for their own files.
_RESERVED_STEMS = ("adapter_model", "model", "diffusion_pytorch_model")


def kohya_file_name(folder: str | Path, step: int | None = None) -> str:
    """Return the file name of a run's kohya export: "runs/icons" -> "icons.safetensors".

    The name is safe in any file system and in a web UI's prompt. It gets the ending "-kohya" if
    PEFT, Transformers or diffusers use the name for their own files, or if diffusers would mistake
    the file for its own.

    Args:
        folder: the run folder, which need not exist.
        step: step of the exported checkpoint; None for the end of the run.
    """
    # A lone surrogate, which a folder's name can contain, becomes a question mark.
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
    """Return the file name of a run's ComfyUI workflow: "runs/icons" -> "icons.comfy.json"."""
    return f"{Path(kohya_file_name(folder)).stem}.comfy.json"


def base_workflow_file_name(folder: str | Path) -> str:
    """Return the file name of the workflow with base-model guidance: "icons.base.comfy.json"."""
    return f"{Path(kohya_file_name(folder)).stem}.base.comfy.json"
