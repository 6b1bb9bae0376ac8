"""Names of LoRA files, of the adapters in them and of the models that have adapters.

A run exports a file for diffusers under a fixed name, and one in kohya's format under the run's.
Importing this takes no time.
"""

from __future__ import annotations

import re
from pathlib import Path

# Adapters, by the names that PEFT has them under. "default" is PEFT's own.
PRIMARY = "default"
AUXILIARY = "auxiliary"
# First values of a primary that were taken out of the base weights; never acts, never trained.
INITIAL = "initial"
# Adapters of further LoRA files, never trained and never exported: one acts in training, one when
# images are made.
ASSISTANT = "assistant"
SAMPLING = "sampling"
FROZEN = (ASSISTANT, SAMPLING)

# Models of pipelines, each of which has one of the denoisers.
DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2")
# Models of a pipeline whose adapters files hold.
COMPONENTS = DENOISERS + ENCODERS

FORMATS = ("diffusers", "kohya", "peft")
# A base model with the adapter merged, beside the formats of LoRA files.
MERGED = "merged"
# The two files of a folder of PEFT's.
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Key under which diffusers' files hold PEFT's configurations.
ADAPTER_METADATA = "lora_adapter_metadata"
# Name of the file for diffusers.
FILE_NAME = "pytorch_lora_weights.safetensors"

# Bytes of a name without its ending; file systems take 255 with all endings.
_LONGEST_STEM = 180
# Letters that no file name may have on Windows, or that end a name in A1111's <lora:name:1>.
_UNSAFE = re.compile(r'[<>:"/\\|?*,\x00-\x1f\x7f]')
# Names that PEFT, Transformers and diffusers give to files of their own.
_RESERVED_STEMS = ("adapter_model", "model", "diffusion_pytorch_model")


def kohya_file_name(folder: str | Path, step: int | None = None) -> str:
    """The name of kohya's file of a run, by its folder: "runs/icons" -> "icons.safetensors".

    It is safe in any file system and in a web UI's prompt. "-kohya" is added to a name that PEFT or
    diffusers give to files of their own, or by whose end diffusers would take the file for its own.

    Args:
        folder: the run folder, which need not exist.
        step: step of the checkpoint that the file is made from; None for the end of the run.
    """
    # Half a surrogate pair, which a folder's name can have, becomes a question mark.
    folder_name = Path(folder).resolve().name.encode("utf-8", "replace").decode("utf-8")
    stem = _UNSAFE.sub("_", folder_name).strip(" .") or "lora"
    # The cut may fall within a letter, which is then dropped.
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
