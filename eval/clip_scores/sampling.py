"""The parameters of sampled images that all images of a comparison share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bilora_diffusion.config.lora_sources import SAMPLING_OPTION, LoraSource, lora_facts
from bilora_diffusion.core.files import without_paths
from bilora_diffusion.core.values import ADAPTER_GUIDANCE

# Images in each call of the denoiser by default; see `Sampling.lanes`
LANES = 4


@dataclass(frozen=True)
class Sampling:
    """Parameters that all images of a comparison share."""

    # Folder, hub id, or "mini"
    base_model: str
    # Side of the images, pixels
    size: int
    # Of the sampler
    steps: int
    guidance_scale: float
    # Factor of each adapter's change of the weights
    scale: float = 1.0
    # Precision of the UNet and the text encoders; the autoencoder decodes in float32
    dtype: str = "float32"
    # Images in each call of the denoiser. More take more memory; another number may change single
    # pixels by one step of 255, so it is a parameter too.
    lanes: int = LANES
    # Model of the unconditional prediction, "adapter" or "base", or the adapter's strength in it
    guidance_from: float | str = ADAPTER_GUIDANCE
    # Of the denoiser's linear weights with the adapters merged into them, such as "int8"; None for
    # adapters beside the weights as they are loaded
    base_precision: str | None = None
    # Noise on the same weights, in units of each base weight's standard deviation
    weight_noise: float = 0.0
    # A LoRA file that acts on all images, such as Lightning
    lora: LoraSource | None = None
    # A ``--sampling_scheduler``; None for the model's
    scheduler: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON values, without those that have no effect and paths."""
        values = asdict(self)
        values["base_model"] = without_paths(self.base_model)
        del values["lora"]
        if self.lora is not None:
            values |= lora_facts({SAMPLING_OPTION: self.lora})
        # They are newer than others: without them, images of earlier versions stay valid.
        for name in ("scheduler", "base_precision", "weight_noise"):
            if not values[name]:
                del values[name]
        return values
