"""Which model a LoRA file is for: what tools call it, and which pipeline's loader reads the file.

A file for a smaller model of a kind must not be offered to the real one, so the real names are
given by the sizes of the configuration alone. They are those that kohya's scripts write: sd-scripts
for Stable Diffusion, FLUX.1 and Lumina 2, musubi-tuner for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .layers import Part


class Names(NamedTuple):
    """What tools call a model.

    Attributes:
        architecture: ModelSpec's, without "/lora".
        version: kohya's ``ss_base_model_version``.
    """

    architecture: str
    version: str


@dataclass(frozen=True)
class Kind:
    """Transformers of one class.

    Attributes:
        pipeline: a pipeline of diffusers whose loader reads their files.
        custom: names of those that are none of the following.
        real: the models that people have, by their sizes.
    """

    pipeline: str
    custom: Names
    real: tuple[tuple[Names, Mapping[str, Any]], ...] = ()

    def names(self, config: Any) -> Names:
        """Of a model with this configuration."""
        for names, sizes in self.real:
            if all(getattr(config, field, None) == size for field, size in sizes.items()):
                return names
        return self.custom


def _sd3(blocks: int, qk_norm: str | None) -> dict[str, Any]:
    return {
        "num_layers": blocks,
        "num_attention_heads": blocks,
        "attention_head_dim": 64,
        "qk_norm": qk_norm,
    }


def _flux(double: int, single: int, heads: int, guidance: bool, channels: int) -> dict[str, Any]:
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "guidance_embeds": guidance,
        "in_channels": channels,
    }


# The sizes are those of the published configurations, as diffusers' conversion scripts have them.
KINDS = {
    "SD3Transformer2DModel": Kind(
        "StableDiffusion3Pipeline",
        Names("stable-diffusion-3-custom", "sd3_custom"),
        (
            (Names("stable-diffusion-3-medium", "medium"), _sd3(24, None)),
            (Names("stable-diffusion-3-5-medium", "5-medium"), _sd3(24, "rms_norm")),
            (Names("stable-diffusion-3-5-large", "5-large"), _sd3(38, "rms_norm")),
        ),
    ),
    "FluxTransformer2DModel": Kind(
        "FluxPipeline",
        Names("flux-1-custom", "flux1_custom"),
        (
            (Names("flux-1-dev", "flux1"), _flux(19, 38, 24, True, 64)),
            (Names("flux-1-schnell", "flux1"), _flux(19, 38, 24, False, 64)),
        ),
    ),
    "Flux2Transformer2DModel": Kind(
        "Flux2Pipeline",
        Names("Flux.2-custom", "flux_2_custom"),
        (
            (Names("Flux.2-dev", "flux_2_dev"), _flux(8, 48, 48, True, 128)),
            (Names("Flux.2-klein-4b", "flux_2_klein_4b"), _flux(5, 20, 24, False, 128)),
            (Names("Flux.2-klein-9b", "flux_2_klein_9b"), _flux(8, 24, 32, False, 128)),
        ),
    ),
    "QwenImageTransformer2DModel": Kind(
        "QwenImagePipeline",
        Names("Qwen-Image-custom", "qwen_image_custom"),
        (
            (
                Names("Qwen-Image", "qwen_image"),
                {
                    "num_layers": 60,
                    "num_attention_heads": 24,
                    "attention_head_dim": 128,
                    "zero_cond_t": False,
                    "use_layer3d_rope": False,
                },
            ),
        ),
    ),
    "ZImageTransformer2DModel": Kind(
        "ZImagePipeline",
        Names("Z-Image-custom", "z_image_custom"),
        (
            (
                Names("Z-Image", "z_image"),
                {"dim": 3840, "n_layers": 30, "n_heads": 30, "siglip_feat_dim": None},
            ),
        ),
    ),
    "Krea2Transformer2DModel": Kind(
        "Krea2Pipeline",
        Names("Krea-2-custom", "krea2_custom"),
        (
            (
                Names("Krea-2", "krea2"),
                {"num_layers": 28, "num_attention_heads": 48, "attention_head_dim": 128},
            ),
        ),
    ),
    "Lumina2Transformer2DModel": Kind(
        "Lumina2Pipeline",
        Names("lumina-2-custom", "lumina2_custom"),
        (
            (
                Names("lumina-2", "lumina2"),
                {
                    "hidden_size": 2304,
                    "num_layers": 26,
                    "num_attention_heads": 24,
                    "num_kv_heads": 8,
                },
            ),
        ),
    ),
}
"""By the class of the transformer."""

SDXL = Names("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
SDXL_CUSTOM = Names("stable-diffusion-xl-custom", "sdxl_custom")
_SDXL_WIDTH = {
    "unet": ("cross_attention_dim", 2048),
    "text_encoder": ("hidden_size", 768),
    "text_encoder_2": ("hidden_size", 1280),
}
# The layers that read so many numbers.
_READS_WIDTH = {"unet": ("attn2.to_k", "attn2.to_v")} | dict.fromkeys(
    ("text_encoder", "text_encoder_2"), ("q_proj", "k_proj", "v_proj")
)


def kind_of(transformer: nn.Module) -> Kind:
    """That of a transformer; for one of a class that is not listed, its class' name and a loader
    that takes the keys as they are.
    """
    classes = [kind.__name__ for kind in type(transformer).__mro__]
    unlisted = Kind(
        "StableDiffusion3Pipeline", Names(f"{classes[0]}-custom", f"{classes[0]}_custom")
    )
    return next((KINDS[name] for name in classes if name in KINDS), unlisted)


def names_of(models: Mapping[str, nn.Module]) -> Names:
    """What tools call the model that these are parts of."""
    if (transformer := models.get("transformer")) is not None:
        return kind_of(transformer).names(getattr(transformer, "config", None))
    return SDXL if _are_sdxl(models) else SDXL_CUSTOM


def names_by_shape(parts: Mapping[str, Part]) -> Names | None:
    """The same of a file's layers; None where they are of a transformer or do not tell."""
    return SDXL if _look_like_sdxl(parts) else None


def _are_sdxl(models: Mapping[str, nn.Module]) -> bool:
    """Whether all of these are as wide as SDXL's."""
    widths = {name: _SDXL_WIDTH[name] for name in models}
    return all(
        getattr(getattr(models[name], "config", None), field, None) == width
        for name, (field, width) in widths.items()
    )


def _look_like_sdxl(parts: Mapping[str, Part]) -> bool:
    """Whether the layers of all parts that tell read what SDXL's read; False where none tells."""
    if not parts.keys() <= _SDXL_WIDTH.keys():
        return False
    widths = {
        layer.A.shape[1] == _SDXL_WIDTH[component][1]
        for component, part in parts.items()
        for layer in part.layers
        if layer.name.endswith(_READS_WIDTH[component])
    }
    return widths == {True}
