"""The sampler of a run's validation images, which is the default for further images of the run.

A LoRA file such as Lightning's requires a certain scheduler, number of steps and guidance scale:
with only some of these settings, the images are spoiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilora_diffusion.config.lora_sources import SAMPLING_OPTION, LoraSource, parse_lora_source
from bilora_diffusion.core.errors import UserError, add_source

# Options of a run that define the sampler of its validation images. The hash identifies the file.
RECORDED_OPTIONS = (
    f"{SAMPLING_OPTION}_sha256",
    f"{SAMPLING_OPTION}_strength",
    "sampling_scheduler",
    "validation_num_inference_steps",
    "validation_guidance_scale",
)


@dataclass(frozen=True)
class RunSampler:
    """Settings that a run gives for its images; None for the model's usual value."""

    lora: LoraSource | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None

    @property
    def text(self) -> str:
        """The LoRA file and the scheduler in words; "" for the model's usual sampler."""
        parts: list[str] = []
        if self.lora is not None:
            parts.append(f"the LoRA file {self.lora.path.name} at {self.lora.strength:g}")
        if self.scheduler is not None:
            parts.append(f"scheduler {self.scheduler}")
        return ", ".join(parts)

    def usual(self, steps: int, guidance_scale: float) -> tuple[int, float]:
        """Return the number of steps and the guidance scale.

        Args:
            steps: the model's usual number of steps, used if the run gives none.
            guidance_scale: the model's usual scale, used if the run gives none.
        """
        if self.guidance_scale is not None:
            guidance_scale = self.guidance_scale
        return self.steps or steps, guidance_scale


USUAL_SAMPLER = RunSampler()  # the model's usual sampler


def has_sampler(config: Mapping[str, Any]) -> bool:
    """Return whether a run gives a LoRA file or a scheduler for its images."""
    return any(config.get(name) is not None for name in (SAMPLING_OPTION, "sampling_scheduler"))


def sampler_of_runs(configs: Sequence[Mapping[str, Any]]) -> RunSampler:
    """Return the common sampler of all runs.

    The result is the model's usual sampler if the runs differ, or if they give neither a LoRA file
    nor a scheduler.

    Args:
        configs: recorded options of the runs; {} for an adapter that is not a run.

    Raises:
        UserError: the LoRA file of the runs is missing, or its content has changed.
    """
    recorded = [[config.get(name) for name in RECORDED_OPTIONS] for config in configs]
    if not recorded or any(values != recorded[0] for values in recorded):
        return USUAL_SAMPLER
    sha256, _, scheduler, steps, guidance_scale = recorded[0]
    lora = None
    if sha256 is not None:
        lora = _recorded_lora(str(configs[0][SAMPLING_OPTION]), str(sha256))
    if lora is None and scheduler is None:
        return USUAL_SAMPLER
    return RunSampler(lora, scheduler, steps, guidance_scale)


def _recorded_lora(value: str, sha256: str) -> LoraSource:
    """Return the LoRA file that a run has recorded, and check that its content is unchanged."""
    with add_source("the runs' images are sampled with a LoRA file (give another one, or none): "):
        source = parse_lora_source(SAMPLING_OPTION, value)
    if source.sha256 != sha256:
        raise UserError(
            f"{source.path} is not the file that the run's images were sampled with: restore that"
            f" file, or give another file or none by --{SAMPLING_OPTION}."
        )
    return source
