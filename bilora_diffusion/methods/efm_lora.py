"""EFMLoRA: SAM's step of the whole weight, carried over to B and remembered from earlier steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import adapters
from ..adapters import PRIMARY, Factors
from . import perturb
from .base import CountingMethod, StepOptimizer
from .bilora import ball
from .hooks import HookedMethod
from .options import EFMLoRAOptions
from .registry import register

PERTURBATION = "perturbation"


@register("efm-lora")
class EFMLoRA(HookedMethod, CountingMethod):
    """The gradient at W0 + s (B + E) A, E on average the best step of the whole weight, one pass.

    For each layer, with G the mean of what dL/dB and dL/dA tell of dL/dW (Equation 12),

        E_t = rho / s  G / ||G||_F  A^+                                       (Equations 13, 15)
        E  <-  (1 - beta) E + beta E_t,   at the first step E_t               (Equation 18)

    where E_t belongs to the gradient at the moved weights that the step is taken with, so the norms
    are of single layers and E serves the next step. A is not moved. Steps that a gradient scaler
    skips leave E alone, as does a step without a layer's gradient that layer's. The logged loss is
    that of the moved weights, `perturbation_norm` is sqrt(sum ||s E A||_F^2) over all layers, in
    Bi-LoRA's units. E is in checkpoints.

    Source: https://arxiv.org/abs/2508.00522v3, Algorithm 2. The sign in its Equations 9 and 13 is
    left out: it would turn the gradient into its absolute value.
    """

    title = "EFMLoRA"
    summary = (
        "Trained with EFMLoRA: each gradient is taken at B moved by a running average of SAM's "
        "steps of the whole weight."
    )

    own_options = EFMLoRAOptions
    reads: ClassVar[frozenset[str]] = frozenset({"rho"})
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"rho": 1e-30})

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self._E}

    def metrics(self) -> dict[str, float]:
        """Length of the next perturbation of the weights."""
        factors = adapters.factors_of(self.layers, PRIMARY)
        perturbations = [
            layer._replace(B=E.flatten(1))
            for layer, E in zip(factors, self._E.values(), strict=True)
        ]
        return {"perturbation_norm": float(ball.frobenius_norm(perturbations))}

    @cached_property
    def _E(self) -> dict[str, Tensor]:
        """E of each layer by name, like its B; zero before the first step."""
        perturbations: dict[str, Tensor] = {}
        for target in self.targets:
            for path, layer in adapters.layers(target.model, PRIMARY):
                _, B = adapters.weights(layer, PRIMARY)
                key = f"{target.name}/{PERTURBATION}/{path}.lora_B.weight"
                perturbations[key] = torch.zeros_like(B, requires_grad=False)
        return perturbations

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Within the context the layers hold B + E."""
        weights: list[Tensor] = [adapters.weights(layer, PRIMARY)[1] for _, layer in self.layers]
        with perturb.restored(weights):
            with torch.no_grad():
                torch._foreach_add_(weights, list(self._E.values()))
            yield

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        with self._perturbed():
            loss = forward_backward()
        optimizer.step()  # with `before_step`, unless a scaler skips it
        optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Algorithm 2: E for the next step, from the gradients that this one is taken with.
        self.steps_taken += 1
        rho, beta = self.rho, self.settings.efm_beta
        if self.settings.efm_schedule == "sqrt":
            rho /= math.sqrt(self.steps_taken)
        with self._perturbed():  # the gradients are of these weights
            gradients = adapters.gradients_of(self.layers, PRIMARY)
            best_steps = perturbations(adapters.factors_of(self.layers, PRIMARY), gradients, rho)
        for E, best_step in zip(self._E.values(), best_steps, strict=True):
            if best_step is not None:  # Equation 18
                E.lerp_(best_step.view_as(E), beta if self.steps_taken > 1 else 1.0)


@torch.no_grad()
def perturbations(
    factors: Sequence[Factors], gradients: Sequence[Factors | None], rho: float
) -> list[Tensor | None]:
    """rho / s G / ||G||_F A^+ of each layer (Equations 12, 13, 15), without forming G.

    With A^T = Q R and B = P S (QR), A^+ = Q R^+^T and, for the gradients g_A and g_B of A and B,

        2 s G = g_B (A^T)^+ + (B^T)^+ g_A = U Q^T + P V,   U = g_B R^+,   V = (S^+)^T g_A

    so that nothing larger than the factors is made, and only r x r matrices are inverted; a zero B
    has the pseudo-inverse zero.

    Args:
        factors: A (r, n), B (m, r) of each layer.
        gradients: of the same, in the same form; None for a layer that has none.
        rho: norm of each layer's step before it is carried over to B.

    Returns:
        (m, r) of each layer, zero for a zero gradient; None for a layer without one.
    """
    best_steps: list[Tensor | None] = [None] * len(factors)
    keys = []
    for layer, gradient in zip(factors, gradients, strict=True):
        is_missing = gradient is None
        shapes = (layer.A.shape, layer.B.shape)
        keys.append((*shapes, layer.A.dtype, layer.A.device, layer.scale, is_missing))
    # Layers of one shape, precision, device and scale are computed at once.
    for group in adapters.alike(keys):
        group_gradients = [gradient for i in group if (gradient := gradients[i]) is not None]
        if not group_gradients:
            continue
        scale, dtype = factors[group[0]].scale, factors[group[0]].B.dtype
        wide = torch.promote_types(dtype, torch.float32)
        A = torch.stack([factors[i].A for i in group]).to(wide)  # (layers, r, n)
        B = torch.stack([factors[i].B for i in group]).to(wide)  # (layers, m, r)
        g_A = torch.stack([gradient.A for gradient in group_gradients]).to(wide)
        g_B = torch.stack([gradient.B for gradient in group_gradients]).to(wide)
        Q, R = torch.linalg.qr(A.mT)
        P, S = torch.linalg.qr(B)
        # What a gradient says along a direction that a factor hardly has is its rounding.
        tolerance = torch.finfo(wide).eps ** 0.5
        R_inverse = torch.linalg.pinv(R, rtol=tolerance)
        S_inverse = torch.linalg.pinv(S, rtol=tolerance)
        U = g_B @ R_inverse  # (layers, m, r)
        V = S_inverse.mT @ g_A  # (layers, r, n)
        inner = V @ Q  # (layers, r, r)
        # ||U Q^T + P V||^2 = ||U||^2 + ||V||^2 + 2 <P^T U, V Q>, as Q and P are orthonormal.
        squares = (U * U).sum((1, 2)) + (V * V).sum((1, 2))
        squares = squares + 2 * ((P.mT @ U) * inner).sum((1, 2))
        norm = squares.clamp_min(0).sqrt()[:, None, None]
        # G A^+ = (U Q^T + P V) Q R^+^T = (U + P V Q) R^+^T; the 1 / 2 s of G cancels in the ratio.
        step = (U + P @ inner) @ R_inverse.mT * (rho / scale)
        step = torch.where(norm > 0, step / norm, 0.0).to(dtype)
        for i, layer_step in zip(group, step, strict=True):
            best_steps[i] = layer_step
    return best_steps
