"""Flat-LoRA: the gradient is taken at randomly perturbed full weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import PRIMARY
from ..core.seeds import seed_of
from . import perturb
from .base import CountingMethod, StepOptimizer
from .options import MethodOptions, rising
from .registry import register


@register("flat-lora")
class FlatLoRA(CountingMethod):
    """min over B, A of E_N L(W0 + s B A + N), with a new N in each optimizer step.

    Row i of N has the standard deviation f rho ||W'_i|| / sqrt(n), where W' = W0 + s B A has n
    columns and f = (1 - cos(pi t / T)) / 2. Its random numbers depend only on seed, step, layer and
    kind of device, so all micro-batches and all processes use the same noise. The noise is added to
    copies of the adapted layers' weights, so the weights themselves keep their exact values.

    Source: Li et al. 2024b (https://arxiv.org/abs/2409.14396), with rho = 0.05 for T5 and Llama and
    0.1 for SDXL.
    """

    title = "Flat-LoRA"
    summary = "Trained as LoRA on base weights with random noise of strength rho."

    reads: ClassVar[frozenset[str]] = frozenset({"rho"})
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"rho": 1e-30})
    default_rho: ClassVar[float] = 0.1
    default_text_rho: ClassVar[float | None] = 0.05

    # Memory for the noisy weights. It is reused, since allocating it in each step would take time.
    _buffers: Sequence[Tensor] = ()

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self.depends_on_length = True

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        self.steps_taken += 1
        # During the pass, W0 + N replaces the frozen weights W0; A and B do not change.
        weights = [adapters.base_weight(layer) for _, layer in self.layers]
        with perturb.replaced(weights, self._noisy_weights(weights)):
            loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def _noisy_weights(self, weights: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """Return the base weights plus the noise of this step."""
        if not self._buffers:
            self._buffers = [torch.empty_like(weight, requires_grad=False) for weight in weights]
        strength = self.rho * rising("cosine", self.options.progress(self.steps_taken))

        def fill_buffer(index: int) -> None:
            path, layer = self.layers[index]
            seed = seed_of(self.options.seed, "flat-lora", self.steps_taken, path)
            noisy_weight(layer, strength, seed, out=self._buffers[index])

        # torch generates normal numbers on one CPU thread, so distribute the layers over threads.
        threads = torch.get_num_threads() if weights[0].device.type == "cpu" else 1
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill_buffer, range(len(weights))))
        return self._buffers


@torch.no_grad()
def noisy_weight(layer: adapters.LoraLayer, strength: float, seed: int, out: Tensor) -> None:
    """Write the base weight of one layer plus normal noise into a tensor.

    Args:
        layer: layer with the primary.
        strength: f rho; the noise of row i has the deviation strength * ||W'_i|| / sqrt(n).
        seed: seed of this layer's noise in this step.
        out: output tensor with the weight's shape and device.
    """
    rows = adapters.base_rows(layer)  # (m, n)
    A = cast(Tensor, layer.lora_A[PRIMARY].weight).detach().flatten(1)
    B = cast(Tensor, layer.lora_B[PRIMARY].weight).detach().flatten(1)
    norms = row_norms(rows, A, B * layer.scaling[PRIMARY])  # (m,)
    deviation = strength * norms / math.sqrt(rows.shape[1])
    # The generator is on the weight's device, so the noise for a seed differs between CPU and GPU.
    generator = torch.Generator(rows.device).manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    out.copy_(adapters.from_rows(layer, noise.mul_(deviation[:, None]).add_(rows)))


def row_norms(rows: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ||W'_i|| for W' = W + B A, (m,), without forming W'.

    ||w_i + b_i A||^2 = ||w_i||^2 + 2 b_i (A w_i) + b_i (A A^T) b_i^T.

    Args:
        rows: W, (m, n), in fp32 or wider.
        A, B: (r, n) and (m, r); B includes the scale.
    """
    A = A.to(rows.dtype)
    B = B.to(rows.dtype)
    base_squares = torch.linalg.vector_norm(rows, dim=1).square()
    cross_terms = (B * (rows @ A.T)).sum(1)
    change_squares = ((B @ (A @ A.T)) * B).sum(1)
    return (base_squares + 2 * cross_terms + change_squares).clamp_min(0).sqrt()
