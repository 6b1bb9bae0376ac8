"""LoRA files for diffusers and for readers of kohya's format, and the proof of what is inside them.

from bilora_diffusion.export import save_diffusers, verify
save_diffusers(folder, {"unet": unet}, base_model="stabilityai/stable-diffusion-xl-base-1.0")
verify(folder, {"unet": unet})

python -m bilora_diffusion.export runs/demo/pytorch_lora_weights.safetensors --to kohya
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..lora_names import COMPONENTS, FILE_NAME, kohya_file_name
from .lorafile import LoraFile, inspect

if TYPE_CHECKING:
    from .cli import main
    from .conversion import convert, save_adapter
    from .readback import verify
    from .writer import save_diffusers, save_models, training_facts

_HOMES = {  # of what needs torch, which a look inside a file does not
    "convert": "conversion",
    "main": "cli",
    "save_adapter": "conversion",
    "save_diffusers": "writer",
    "save_models": "writer",
    "training_facts": "writer",
    "verify": "readback",
}
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
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
