"""LoRA files for diffusers and for readers of kohya's format, and the proof of what is inside them.

from bilora_diffusion.export import save_diffusers, verify
save_diffusers(folder, {"unet": unet}, base_model="stabilityai/stable-diffusion-xl-base-1.0")
verify(folder, {"unet": unet})

python -m bilora_diffusion.export runs/demo/pytorch_lora_weights.safetensors --to kohya
"""

from __future__ import annotations

from ..lora_names import FILE_NAME, kohya_file_name
from .cli import main
from .convert import convert
from .layers import COMPONENTS
from .lorafile import LoraFile, inspect
from .metadata import training_facts
from .peft_folder import save_adapter, verify_adapter
from .readback import verify
from .weights import save_models
from .writer import save_diffusers

__all__ = [
    "COMPONENTS",
    "FILE_NAME",
    "LoraFile",
    "convert",
    "inspect",
    "kohya_file_name",
    "main",
    "save_adapter",
    "save_diffusers",
    "save_models",
    "training_facts",
    "verify",
    "verify_adapter",
]
