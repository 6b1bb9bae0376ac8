"""What `pictures.py` can train and sample: variants, kinds of guidance, and presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bilora_diffusion.core.errors import UserError

CONTROL = "LoRA"
RADIUS_AUTO = "Bi-LoRA, rho auto"
PER_SAMPLE = "Bi-LoRA, per sample"
HELD_UNCONDITIONAL = "LoRA, held"
SAMPLES = {"method": "bilora", "rho": "auto", "auxiliaries": "sample"}
VARIANTS: dict[str, dict[str, bool | str]] = {
    CONTROL: {"method": "lora"},
    "Bi-LoRA": {"method": "bilora"},
    RADIUS_AUTO: {"method": "bilora", "rho": "auto"},
    PER_SAMPLE: {**SAMPLES},
    HELD_UNCONDITIONAL: {"method": "lora", "hold_unconditional": "4"},
    "LoRA-SAM": {"method": "lora-sam"},
    "LoRA, EMA": {"method": "lora", "use_ema": True},
    # Does one of these keep the subjects that an auxiliary for each sample loses early?
    "per sample, a quarter of the rise": {**SAMPLES, "loss_rise": "0.1"},
    "per sample, at low noise": {**SAMPLES, "auxiliary_snr_gamma": "50"},
    "per sample, doubled rate": {**SAMPLES, "learning_rate": "2.0e-3"},
    "LoRA, doubled rate": {"method": "lora", "learning_rate": "2.0e-3"},
    # How often, and how strongly, the unconditional prediction is held.
    "LoRA, held weakly": {"method": "lora", "hold_unconditional": "1"},
    "LoRA, held strongly": {"method": "lora", "hold_unconditional": "16"},
    "LoRA, held often": {
        "method": "lora",
        "hold_unconditional": "1",
        "hold_unconditional_every": "4",
    },
    "Bi-LoRA, held": {"method": "bilora", "hold_unconditional": "4"},
}


@dataclass(frozen=True)
class Guidance:
    """Where the unconditional prediction comes from, and the scale of guidance."""

    source: str  # "adapter" or "base"
    scale: float

    @property
    def label(self) -> str:
        """As figures and tables name it."""
        owner = "base's " if self.source == "base" else ""
        return f"{owner}guidance {self.scale:g}"


@dataclass(frozen=True)
class Preset:
    """What is trained and sampled.

    Args:
        recipe: YAML file of the training script.
        variants: labels of `VARIANTS`.
        options: further options of all runs.
        prompts: ``--prompts`` of eval.clip_scores.
        steps: checkpoints that are sampled; the last one is the end of training.
        guidances: kinds of guidance.
        seeds: of training.
        sampling_seeds: images of each prompt.
        max_prompts: of the set; None for all.
        scoring: further flags of eval.clip_scores.
    """

    recipe: str
    prompts: str
    steps: tuple[int, ...]
    guidances: tuple[Guidance, ...]
    variants: tuple[str, ...]
    options: dict[str, bool | str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sampling_seeds: tuple[int, ...] = (0,)
    max_prompts: int | None = None
    scoring: tuple[str, ...] = ()


def mini_preset(dataset: str, **changes: Any) -> Preset:
    """The miniature on one of its sets, past the lowest held-out loss; 32 held-out captions."""
    return Preset(
        recipe="recipes/mini.yaml",
        prompts=f"{dataset}-heldout",
        steps=(100, 300, 500, 1000),
        guidances=(Guidance("adapter", 4.0), Guidance("base", 2.0)),
        variants=(CONTROL, "Bi-LoRA", RADIUS_AUTO, PER_SAMPLE, HELD_UNCONDITIONAL),
        # A quarter of the held-out pictures: all of them take longer than the training.
        options={
            "dataset": dataset,
            "validation_part": "1/4",
            "validation_loss_steps": "100",
            "num_validation_images": "0",
        },
        max_prompts=32,
        # Of 15 steps in place of 25, truth is 0.4 lower for LoRA and others alike.
        scoring=("--general_prompts", "none", "--skip_captions", "--num_inference_steps", "15"),
        **changes,
    )


# Two seeds of 200 prompts; the held-out loss is not measured, since all pictures are trained on.
GPU_SAMPLING: dict[str, Any] = {
    "prompts": "3d_icon",
    "variants": (CONTROL, "Bi-LoRA", RADIUS_AUTO),
    "seeds": (0, 1, 2),
    "sampling_seeds": (0, 1),
    "scoring": ("--general_prompts", "none", "--image_model", "dinov2:facebook/dinov2-base"),
}
PRESETS = {
    "mini-icons": mini_preset("mini"),
    "mini-animals": mini_preset("mini-animals"),
    "mini-duotone": mini_preset("mini-duotone"),
    "mini-gray": mini_preset("mini-gray"),
    "mini-pastel": mini_preset("mini-pastel"),
    "sdxl-3d_icon": Preset(
        recipe="recipes/sdxl_3d_icon.yaml",
        steps=(500, 1000, 2000),
        guidances=(Guidance("adapter", 5.0), Guidance("base", 3.0)),
        options={"num_validation_images": "0", "mixed_precision": "bf16"},
        **GPU_SAMPLING,
    ),
    "flux2_klein": Preset(
        recipe="recipes/flux2_klein.yaml",
        steps=(500, 1000, 2000),
        guidances=(Guidance("adapter", 4.0), Guidance("base", 2.5)),
        options={"dataset": "linoyts/3d_icon", "num_validation_images": "0"},
        **GPU_SAMPLING,
    ),
}


def read_guidances(text: str | None) -> tuple[Guidance, ...]:
    """The kinds of guidance of ``adapter:4,base:2``; none for None."""
    guidances = []
    for word in (text or "").split(","):
        if not word.strip():
            continue
        source, _, scale = word.strip().partition(":")
        try:
            guidance = Guidance(source, float(scale))
        except ValueError:
            guidance = Guidance("", 0.0)
        if guidance.source not in ("adapter", "base"):
            raise UserError(f'--guidances has "{word.strip()}": write adapter:4 or base:2.')
        guidances.append(guidance)
    return tuple(guidances)
