"""Flat-LoRA: the gradient is taken at randomly perturbed full weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .. import adapters, perturb
from ..adapters import PRIMARY
from ..data.seeds import seed_of
from .base import Method, MethodOptions, StepOptimizer, register
from .options import rising


@register("flat-lora")
class FlatLoRA(Method):
    """min over B, A of E_N L(W0 + s B A + N), one draw of N in each optimizer step.

    Row i of N has the standard deviation f rho ||W'_i|| / sqrt(n) with W' = W0 + s B A of n columns
    and f = (1 - cos(pi t / T)) / 2. The noise stands while all micro-batches of a step run; it is
    a function of seed, step and layer, so every process has the same. The disturbed weights of the
    adapted layers take memory of their own, so that the weights themselves stay what they are.

    Source: Li et al. 2024b (https://arxiv.org/abs/2409.14396); rho 0.05 (T5, Llama), 0.1 (SDXL).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rho"})
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"rho": 1e-30})
    default_rho: ClassVar[float] = 0.1

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._taken = 0
        self._buffers: list[Tensor] = []

    @property
    def depends_on_length(self) -> bool:
        return True

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        self._taken += 1
        layers = [
            (f"{target.name}.{path}", layer)
            for target in self.targets
            for path, layer in adapters.layers(target.model, PRIMARY)
        ]
        weights = [adapters.base_weight(layer) for _, layer in layers]
        with perturb.replaced(weights, self._noisy_weights(layers, weights)):
            loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def _noisy_weights(
        self, layers: Sequence[tuple[str, adapters.LoraLayer]], weights: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        if not self._buffers:  # kept from step to step: fresh memory costs time too
            self._buffers = [torch.empty_like(weight, requires_grad=False) for weight in weights]
        strength = self.rho * rising("cosine", self.options.progress(self._taken))

        def make(index: int) -> None:
            path, layer = layers[index]
            seed = seed_of(self.options.seed, "flat-lora", self._taken, path)
            noisy_weight(layer, strength, seed, out=self._buffers[index])

        # torch draws normal numbers on one CPU thread; layers are independent, so they share all.
        threads = torch.get_num_threads() if weights[0].device.type == "cpu" else 1
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(make, range(len(layers))))
        return self._buffers

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._taken = state["taken"]


@torch.no_grad()
def noisy_weight(layer: adapters.LoraLayer, strength: float, seed: int, out: Tensor) -> None:
    """Write the base weight of one layer plus normal noise.

    Args:
        strength: f rho; row i gets the standard deviation strength * ||W'_i|| / sqrt(n).
        seed: of this layer's noise in this step.
        out: like the weight.
    """
    rows = adapters.output_rows(layer)  # (m, n), a view of the weight
    (factors,) = adapters.factors_of([("", layer)], PRIMARY)
    deviation = strength * row_norms(rows, factors) / math.sqrt(rows.shape[1])
    generator = torch.Generator(rows.device).manual_seed(seed)
    wide = torch.promote_types(rows.dtype, torch.float32)
    noise = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=wide)
    adapters.output_rows(layer, out).copy_(noise.mul_(deviation[:, None]).add_(rows))


def row_norms(rows: Tensor, factors: adapters.Factors) -> Tensor:
    """||W'_i|| for W' = W + s B A, (m,), without forming W'.

    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s b_i (A w_i) + s^2 b_i (A A^T) b_i^T.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    A, B = factors.A.to(wide), factors.B.to(wide) * factors.scale
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=wide).square()
    cross = (B * (rows.to(wide) @ A.T)).sum(1)
    own = ((B @ (A @ A.T)) * B).sum(1)
    return cast(Tensor, squares + 2 * cross + own).clamp_min(0).sqrt()
