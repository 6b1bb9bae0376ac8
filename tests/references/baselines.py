"""The methods that Bi-LoRA is compared with, word for word: full matrices and Python loops.

Slow and literal on purpose; written from the papers' formulas, without the product's code. The
network is layer2(tanh(layer1(x))) with the mean squared error, as in ``bilora.py`` here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.references.bilora import SGD, AdamW

Rules = list[dict[str, SGD | AdamW]]


@dataclass
class Layer:
    """A weight W0 (m, n), a bias b (m,), and one adapter of scale s."""

    W0: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    s: float

    def weight(self) -> Tensor:
        return self.W0 + self.s * (self.B @ self.A)


@dataclass
class Gradients:
    """dL/dW (m, n) and dL/db (m,) of one layer."""

    W: Tensor
    b: Tensor


def backward(
    weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor, y: Tensor
) -> tuple[float, list[Gradients]]:
    """The loss and its gradients by the chain rule, written out."""
    hidden = torch.tanh(x @ weights[0].T + biases[0])
    output = hidden @ weights[1].T + biases[1]
    d_output = 2 * (output - y) / y.numel()
    d_hidden = (d_output @ weights[1]) * (1 - hidden**2)
    gradients = [
        Gradients(d_hidden.T @ x, d_hidden.sum(0)),
        Gradients(d_output.T @ hidden, d_output.sum(0)),
    ]
    return float(((output - y) ** 2).mean()), gradients


def factor_gradients(
    layers: list[Layer], x: Tensor, y: Tensor
) -> tuple[float, list[dict[str, Tensor]]]:
    """dL/dA and dL/dB of every layer at the layers' present factors."""
    loss, full = backward([la.weight() for la in layers], [la.b for la in layers], x, y)
    return loss, [_to_factors(la, g.W) for la, g in zip(layers, full, strict=True)]


def _to_factors(layer: Layer, dW: Tensor) -> dict[str, Tensor]:
    return {"A": layer.s * layer.B.T @ dW, "B": layer.s * dW @ layer.A.T}


def descend(layers: list[Layer], rules: Rules, gradients: list[dict[str, Tensor]]) -> None:
    """One step of the optimizer on all factors."""
    for layer, rule, gradient in zip(layers, rules, gradients, strict=True):
        for name, value in gradient.items():
            setattr(layer, name, rule[name].update(getattr(layer, name), value))


def lora(layers: list[Layer], rules: Rules, x: Tensor, y: Tensor) -> float:
    """Plain LoRA."""
    loss, gradients = factor_gradients(layers, x, y)
    descend(layers, rules, gradients)
    return loss


def lora_sam(layers: list[Layer], rules: Rules, x: Tensor, y: Tensor, rho: float) -> float:
    """Equations 3 to 5 on the factors: e = rho g / ||g||, then the gradient at A + e_A, B + e_B."""
    loss, gradients = factor_gradients(layers, x, y)
    norm = math.sqrt(sum(float((g**2).sum()) for each in gradients for g in each.values()))
    uphill = [
        Layer(la.W0, la.b, la.A + rho * g["A"] / norm, la.B + rho * g["B"] / norm, la.s)
        for la, g in zip(layers, gradients, strict=True)
    ]
    _, perturbed = factor_gradients(uphill, x, y)
    descend(layers, rules, perturbed)
    return loss


def l2sp(
    layers: list[Layer],
    rules: Rules,
    x: Tensor,
    y: Tensor,
    strength: float,
    before: Sequence[Tensor],
) -> float:
    """The gradient of L + strength sum_i ||W_i - before_i||_F^2, by the chain rule."""
    loss, full = backward([la.weight() for la in layers], [la.b for la in layers], x, y)
    gradients = [
        _to_factors(la, g.W + 2 * strength * (la.weight() - W))
        for la, g, W in zip(layers, full, before, strict=True)
    ]
    descend(layers, rules, gradients)
    return loss


def bar(
    layers: list[Layer], rules: Rules, x: Tensor, y: Tensor, strength: float, lr: float, kind: str
) -> float:
    """oBAR and nBAR: balance each layer, then take the optimizer's step with the same gradient."""
    loss, gradients = factor_gradients(layers, x, y)
    for layer, g in zip(layers, gradients, strict=True):
        if kind == "oBAR":
            A_shrinks = _length(layer.A) >= _length(layer.B)
        else:
            A_shrinks = not _length(g["A"]) >= _length(g["B"])
        small, large = 1 - strength * lr, 1 + strength * lr
        layer.A = layer.A * (small if A_shrinks else large)
        layer.B = layer.B * (large if A_shrinks else small)
    descend(layers, rules, gradients)
    return loss


def flat_lora(
    layers: list[Layer],
    rules: Rules,
    x: Tensor,
    y: Tensor,
    rho: float,
    progress: float,
    normal: Sequence[Tensor],
) -> float:
    """Flat-LoRA: the factors' gradients at W' + N, N scaled row by row.

    Args:
        progress: t / T.
        normal: standard normal numbers (m, n) of each layer.
    """
    f = (1 - math.cos(math.pi * progress)) / 2
    weights = []
    for layer, z in zip(layers, normal, strict=True):
        W = layer.weight()
        noise = torch.empty_like(W)
        for i in range(W.shape[0]):
            noise[i] = z[i] * (f * rho * float((W[i] ** 2).sum().sqrt()) / math.sqrt(W.shape[1]))
        weights.append(W + noise)
    loss, full = backward(weights, [layer.b for layer in layers], x, y)
    factors = [_to_factors(layer, g.W) for layer, g in zip(layers, full, strict=True)]
    descend(layers, rules, factors)
    return loss


def full(layers: list[Layer], rules: Rules, x: Tensor, y: Tensor) -> float:
    """Full fine-tuning: the optimizer's step on W0 and b themselves."""
    loss, gradients = backward([la.W0 for la in layers], [la.b for la in layers], x, y)
    descend(layers, rules, [{"W0": g.W, "b": g.b} for g in gradients])
    return loss


def _length(tensor: Tensor) -> float:
    return float((tensor**2).sum().sqrt())
