"""The sampling parameters that all images of a comparison share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bilora_diffusion.config.lora_sources import SAMPLING_OPTION, LoraSource, lora_facts
from bilora_diffusion.core.files import without_paths
from bilora_diffusion.core.values import ADAPTER_GUIDANCE

# Default number of images per call of the denoiser; see `Sampling.lanes`
LANES = 4


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters that all images of a comparison share."""

    # Folder, hub id, or the name of a miniature
    base_model: str
    # Side of the square images in pixels
    size: int
    # Number of sampler steps
    steps: int
    guidance_scale: float
    # Strength of each adapter: factor of its weight update
    scale: float = 1.0
    # Dtype of the denoiser and the text encoders; the autoencoder always decodes in float32.
    dtype: str = "float32"
    # Number of images per call of the denoiser. A larger number takes more memory. The number can
    # change single pixels by 1 of 255, so it is one of the parameters.
    lanes: int = LANES
    # Model of the unconditional prediction ("adapter" or "base"), or the adapter's strength in it
    guidance_from: float | str = ADAPTER_GUIDANCE
    # Precision to which the denoiser's linear weights are rounded after each adapter is merged,
    # such as "int8"; None for unmerged adapters on unrounded weights
    base_precision: str | None = None
    # Standard deviation of noise on the same weights, in units of each base weight's standard
    # deviation; 0 for no noise
    weight_noise: float = 0.0
    # LoRA file that is applied to all images, such as Lightning; None if there is none
    lora: LoraSource | None = None
    # Value of ``--sampling_scheduler``; None for the model's own scheduler
    scheduler: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON values, without paths and without unused options."""
        values = asdict(self)
        values["base_model"] = without_paths(self.base_model)
        del values["lora"]
        if self.lora is not None:
            values |= lora_facts({SAMPLING_OPTION: self.lora})
        # Earlier versions did not store these; omitting unused ones keeps their images valid.
        for name in ("scheduler", "base_precision", "weight_noise"):
            if not values[name]:
                del values[name]
        return values
