"""Training with methods that are measured against, and not offered: rivals and controls.

    python benchmarks/controls.py --config recipes/mini.yaml --method t-lora
    python -m eval.sweep recipes/mini.yaml --script benchmarks/controls.py \\
        --over method=lora,t-lora seed=0..4

Takes the options of ``train_dreambooth_bilora.py`` and some more values of ``--method``:

- ``t-lora``: T-LoRA's mask of ranks by noise level. Its file acts as trained only where the mask is
  applied too, which no program that loads LoRA files does, so it is not among the methods.
- ``bilora-random``: as many auxiliaries as samples, but at each draw any one of them.
- ``bilora-frozen``: each sample has an auxiliary of its own that is random, of norm rho, and stays.
- ``sam-by-batch``: LoRA-SAM whose perturbation is each micro-batch's own, so that m of m-sharpness
  is ``--train_batch_size`` (Andriushchenko & Flammarion, ICML 2022).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bilora_diffusion.adapters import PRIMARY, fused
from bilora_diffusion.fields import option
from bilora_diffusion.methods import get, perturb
from bilora_diffusion.methods.base import Method, MethodOptions, StepOptimizer
from bilora_diffusion.methods.options import OwnOptions
from bilora_diffusion.methods.registry import register
from bilora_diffusion.seeds import seed_of
from bilora_diffusion.values import SHARES

BiLoRA: Any = get("bilora")


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
        # A UNet is given timesteps of 1000, a flow transformer sigma.
        total = 1000.0 if isinstance(model, UNet2DConditionModel) else 1.0
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


@register("bilora-random")
class RandomAuxiliary(BiLoRA):
    """Bi-LoRA with several auxiliaries of which each draw of a sample sees any."""

    draws = 0

    def expect(self, samples: Sequence[int | None]) -> None:
        """Nobody knows what will be drawn."""

    def seen(
        self, samples: Sequence[int | None], snr: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        count = len(self.options.sample_names)
        drawn: list[int | None] = []
        for sample in samples:
            self.draws += 1
            place = seed_of(self.options.seed, "bilora-random", self.draws)
            drawn.append(None if sample is None else place % count)
        return super().seen(drawn, snr)


@register("bilora-frozen")
class FrozenAuxiliary(BiLoRA):
    """Bi-LoRA with an auxiliary for each sample that is a random direction of norm rho."""

    def param_groups(self, targets: Sequence[Any]) -> list[dict[str, Any]]:
        groups = super().param_groups(targets)
        generator = torch.Generator().manual_seed(seed_of(self.options.seed, "bilora-frozen"))
        for group in groups[len(targets) :]:
            group["lr"] = 0.0
            for flat in group["params"]:
                drawn = torch.randn(flat.shape, generator=generator)
                flat.data.copy_(100 * self.rho * drawn)  # outside of the ball
        self.auxiliary.project_(range(self.auxiliary.count), self.rho)
        return groups


@register("sam-by-batch")
class SAMByBatch(Method):
    """min over B, A of the mean over micro-batches of max over ||e|| <= rho of L_i(. + e)."""

    title = "LoRA-SAM by micro-batch"
    passes = 2
    reads: ClassVar[frozenset[str]] = frozenset({"rho"})
    limit = None

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._own: list[list[Tensor]] = []  # the gradient of each micro-batch of the step
        self._next: Iterator[list[Tensor]] | None = None  # in the second pass

    @contextmanager
    def seen(self, samples: Sequence[int | None], snr: Sequence[float] = ()) -> Iterator[None]:
        if self._next is None:
            before = self._gradients()
            yield
            self._own.append([g - b for g, b in zip(self._gradients(), before, strict=True)])
            return
        with perturb.restored(self.weights):
            perturb.move_(self.weights, next(self._next), self.rho)
            fused.forget()
            yield

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in self.weights]

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        self._own = []
        loss = forward_backward()
        optimizer.zero_grad()
        self._next = iter(self._own)
        forward_backward()
        self._next = None
        optimizer.step()
        optimizer.zero_grad()
        return loss


if __name__ == "__main__":
    from train_dreambooth_bilora import main

    sys.exit(main())
