"""EFMLoRA: SAM's step of the whole weight, carried over to B and remembered from earlier steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from .base import Counting
from .bilora import ball
from .hooks import BeforeStep
from .options import EFMLoRAOptions
from .registry import register

PERTURBATION = "perturbation"


@register("efm-lora")
class EFMLoRA(BeforeStep, Counting):
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
        factors = adapters.factors_of(self.primary_layers, PRIMARY)
        moves = [f._replace(B=E.flatten(1)) for f, E in zip(factors, self._E.values(), strict=True)]
        return {"perturbation_norm": float(ball.frobenius_norm(moves))}

    @cached_property
    def _E(self) -> dict[str, Tensor]:
        """E of each layer by name, like its B; zero before the first step."""
        return {
            f"{target.name}/{PERTURBATION}/{path}.lora_B.weight": torch.zeros_like(
                adapters.weights(layer, PRIMARY)[1], requires_grad=False
            )
            for target in self.targets
            for path, layer in adapters.layers(target.model, PRIMARY)
        }

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Within the context the layers hold B + E."""
        layers = self.primary_layers
        weights: list[Tensor] = [adapters.weights(layer, PRIMARY)[1] for _, layer in layers]
        with perturb.restored(weights):
            with torch.no_grad():
                torch._foreach_add_(weights, list(self._E.values()))
            yield

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.taken += 1
        rho, beta = self.rho, self.own.efm_beta
        if self.own.efm_schedule == "sqrt":
            rho /= math.sqrt(self.taken)
        with self.moved():  # the gradients are of these weights
            gradients = adapters.gradients_of(self.primary_layers, PRIMARY)
            steps = perturbations(adapters.factors_of(self.primary_layers, PRIMARY), gradients, rho)
        for E, step in zip(self._E.values(), steps, strict=True):
            if step is not None:
                E.lerp_(step.view_as(E), beta if self.taken > 1 else 1.0)


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
    found: list[Tensor | None] = [None] * len(factors)
    for group in adapters.alike(
        (f.A.shape, f.B.shape, f.A.dtype, f.A.device, f.scale, gradient is None)
        for f, gradient in zip(factors, gradients, strict=True)
    ):
        first = group[0]
        if gradients[first] is None:
            continue
        A, B, g_A, g_B = (
            torch.stack([getattr(each[i], side) for i in group])
            for each in (factors, gradients)
            for side in "AB"
        )
        dtype, wide = B.dtype, torch.promote_types(B.dtype, torch.float32)
        A, B, g_A, g_B = (stack.to(wide) for stack in (A, B, g_A, g_B))
        (Q, R), (P, S) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
        # What a gradient says along a direction that a factor hardly has is its rounding.
        R, S = (torch.linalg.pinv(x, rtol=torch.finfo(wide).eps ** 0.5) for x in (R, S))
        U, V = g_B @ R, S.mT @ g_A
        inner = V @ Q  # (r, r)
        square = (U * U).sum((1, 2)) + (V * V).sum((1, 2)) + 2 * ((P.mT @ U) * inner).sum((1, 2))
        norm = square.clamp_min(0).sqrt()[:, None, None]
        step = (U + P @ inner) @ R.mT * (rho / factors[first].scale)
        step = torch.where(norm > 0, step / norm, 0.0).to(dtype)
        for i, own in zip(group, step, strict=True):
            found[i] = own
    return found
