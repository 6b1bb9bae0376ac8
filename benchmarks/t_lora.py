"""T-LoRA, a rival that is measured against and not offered: its file acts as trained only where its
mask of ranks is applied too, which no program that loads LoRA files does.

    python benchmarks/t_lora.py --config recipes/mini.yaml --method t-lora
    python -m eval.sweep eval/experiments/flow_judged.yaml

Takes the options of ``train_dreambooth_bilora.py``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.core.fields import option
from bilora_diffusion.core.values import SHARES
from bilora_diffusion.methods.base import Method
from bilora_diffusion.methods.options import OwnOptions
from bilora_diffusion.methods.registry import register


@dataclass(frozen=True)
class TLoRAOptions(OwnOptions):
    """Options that only T-LoRA reads."""

    tlora_least: float = option(
        0.5, "t-lora: share of the ranks that act at pure noise (0.5 in the paper).", range=SHARES
    )


@register("t-lora")
class TLoRA(Method):
    """At noise level t of T only the first r(t) = floor((r - r_min) (T - t) / T) + r_min ranks act,
    in training, evaluation and drawing.

    Source: https://arxiv.org/abs/2507.05964, Eqs. 4 and 5, without its orthogonal start.
    """

    title = "T-LoRA"
    own_options = TLoRAOptions
    limit = None

    def inject_others(self) -> None:
        self._masks: dict[str, Tensor] = {}
        for target in self.targets:
            note = partial(self._note_level, target.name)
            target.model.register_forward_pre_hook(note, with_kwargs=True)
        for path, layer in self.layers():
            down: Any = layer.lora_A[PRIMARY]
            down.register_forward_hook(partial(self._mask_ranks, path.split(".")[0]))

    def _note_level(self, name: str, model: nn.Module, args: Any, kwargs: Any) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # Other flow transformers than SD3's are given sigma (Lumina 2: what is left of 1).
        total = 1000.0 if isinstance(model, UNet2DConditionModel | SD3Transformer2DModel) else 1.0
        self._masks[name] = 1 - torch.as_tensor(timestep).float().reshape(-1) / total

    def _mask_ranks(self, name: str, _: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        channels = 1 if hidden.dim() == 4 else hidden.dim() - 1
        rank = hidden.shape[channels]
        least = max(1, round(self.own.tlora_least * rank))
        clear = self._masks[name].to(hidden.device)
        acting = ((rank - least) * clear).floor() + least
        active = torch.arange(rank, device=hidden.device) < acting[:, None]
        shape = [len(active), *[1] * (hidden.dim() - 1)]
        shape[channels] = rank
        return hidden * active.view(shape).to(hidden.dtype)


if __name__ == "__main__":
    from train_dreambooth_bilora import main

    sys.exit(main())
