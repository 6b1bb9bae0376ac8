"""The methods word for word: full weight matrices, gradients of W by hand, one layer after another.

Slow and literal on purpose; written from the papers' formulas, without the product's code. The
network is layer2(tanh(layer1(x))) with the mean squared error. A method is a function that takes
one step of a `Net` on rows x and y and returns the loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass
class Layer:
    """A weight W0 (m, n), bias b (m,), an adapter of scale s, and an auxiliary or none."""

    W0: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    s: float
    A2: Tensor | None = None
    B2: Tensor | None = None
    s2: float = 0.0

    def change(self, scaled: bool = True) -> Tensor:
        """The auxiliary's change of the weight."""
        if self.A2 is None or self.B2 is None:
            return torch.zeros_like(self.W0)
        return (self.s2 if scaled else 1.0) * (self.B2 @ self.A2)

    def weight(self) -> Tensor:
        """Equation 7, with the scales of LoRA."""
        return self.W0 + self.s * (self.B @ self.A) + self.change()


@dataclass
class AdamW:
    """Loshchilov and Hutter's AdamW for one matrix; `ascend` adds the update to the matrix."""

    lr: float
    weight_decay: float = 0.0
    ascend: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    k: int = 0
    m: Tensor = field(default_factory=lambda: torch.zeros(()))
    v: Tensor = field(default_factory=lambda: torch.zeros(()))

    def update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The new value of the parameter."""
        if self.ascend:
            gradient = -gradient
        self.k += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.k)
        v_hat = self.v / (1 - self.beta2**self.k)
        decayed = parameter - self.lr * self.weight_decay * parameter
        return decayed - self.lr * m_hat / (v_hat.sqrt() + self.eps)


@dataclass
class SGD:
    """Plain gradient steps for one matrix."""

    lr: float
    weight_decay: float = 0.0
    ascend: bool = False

    def update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The new value of the parameter."""
        if self.ascend:
            gradient = -gradient
        return parameter - self.lr * gradient


Gradients = list[dict[str, Tensor]]
"""A tensor for each matrix of each layer: gradients, or a direction."""
Rules = Sequence[Mapping[str, SGD | AdamW]]


@dataclass
class Net:
    """Two layers with the optimizer of each matrix, the number of the step from 0, and numbers
    that a method records.
    """

    layers: list[Layer]
    rules: Rules
    k: int = 0
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def gradients(
        self, x: Tensor, y: Tensor, weights: Sequence[Tensor] = ()
    ) -> tuple[float, Gradients]:
        """The loss and the gradients of all factors, at the layers' own weights or at others."""
        weights = weights or [layer.weight() for layer in self.layers]
        loss, full = backward(weights, self.layers, x, y)
        pairs = zip(self.layers, full, strict=True)
        return loss, [to_factors(layer, gradient["W0"]) for layer, gradient in pairs]

    def moved(self, factor: float, direction: Gradients) -> Self:
        """The same net with its factors moved along a direction."""
        layers = []
        for layer, vectors in zip(self.layers, direction, strict=True):
            factors = {name: getattr(layer, name) + factor * v for name, v in vectors.items()}
            layers.append(replace(layer, **factors))
        return replace(self, layers=layers)

    def descend(self, gradients: Gradients) -> None:
        """One step of the optimizer on everything that has a gradient, all at once."""
        for layer, rule, gradient in zip(self.layers, self.rules, gradients, strict=True):
            for name, value in gradient.items():
                setattr(layer, name, rule[name].update(getattr(layer, name), value))


def backward(
    weights: Sequence[Tensor], layers: list[Layer], x: Tensor, y: Tensor
) -> tuple[float, Gradients]:
    """The loss at these weights, and dL/dW0 (m, n) and dL/db (m,) by the chain rule.

    Args:
        weights: of both layers, in place of their own.
        layers: whose biases are taken.
        x: (rows, n) of the first layer.
        y: (rows, m) of the second layer.
    """
    hidden = torch.tanh(x @ weights[0].T + layers[0].b)
    output = hidden @ weights[1].T + layers[1].b
    # L is the mean over all rows and outputs; tanh' = 1 - tanh^2.
    d_output = 2 * (output - y) / y.numel()
    d_hidden = (d_output @ weights[1]) * (1 - hidden**2)
    gradients = [
        {"W0": d_hidden.T @ x, "b": d_hidden.sum(0)},
        {"W0": d_output.T @ hidden, "b": d_output.sum(0)},
    ]
    return float(((output - y) ** 2).mean()), gradients


def to_factors(layer: Layer, dW: Tensor) -> dict[str, Tensor]:
    """The gradients that stand in Eq. 9, times the scales."""
    gradients = {"A": layer.s * layer.B.T @ dW, "B": layer.s * dW @ layer.A.T}
    if layer.A2 is not None and layer.B2 is not None:
        gradients["A2"] = layer.s2 * layer.B2.T @ dW
        gradients["B2"] = layer.s2 * dW @ layer.A2.T
    return gradients


def norm(matrices: Iterable[Tensor]) -> float:
    """Norm of all matrices together."""
    return math.sqrt(sum(float((matrix**2).sum()) for matrix in matrices))


def lora(net: Net, x: Tensor, y: Tensor) -> float:
    """Plain LoRA, or line 7 of Algorithm 1 where there is an auxiliary."""
    loss, gradients = net.gradients(x, y)
    net.descend(gradients)
    return loss


def full(net: Net, x: Tensor, y: Tensor) -> float:
    """Full fine-tuning: the optimizer's step on W0 and b themselves."""
    loss, gradients = backward([layer.W0 for layer in net.layers], net.layers, x, y)
    net.descend(gradients)
    return loss


def lora_sam(net: Net, x: Tensor, y: Tensor, rho: float) -> float:
    """Equations 3 to 5 on the factors: e = rho g / ||g||, then the gradient at A + e_A, B + e_B."""
    loss, g = net.gradients(x, y)
    length = norm(matrix for gradient in g for matrix in gradient.values())
    perturbed_net = net.moved(rho / length, g)
    _, perturbed_gradients = perturbed_net.gradients(x, y)
    net.descend(perturbed_gradients)
    return loss


def bar(net: Net, x: Tensor, y: Tensor, kind: str, strength: float) -> float:
    """oBAR and nBAR: balance each layer, then take the optimizer's step with the same gradient."""
    loss, gradients = net.gradients(x, y)
    for layer, rule, g in zip(net.layers, net.rules, gradients, strict=True):
        if kind == "oBAR":
            A_shrinks = float(layer.A.norm()) >= float(layer.B.norm())
        else:
            A_shrinks = float(g["A"].norm()) < float(g["B"].norm())
        share = strength * rule["A"].lr
        if A_shrinks:
            share = -share
        layer.A = layer.A * (1 + share)
        layer.B = layer.B * (1 - share)
    net.descend(gradients)
    return loss


def flat_lora(net: Net, x: Tensor, y: Tensor, rho: float, normal: Sequence[Tensor]) -> float:
    """Flat-LoRA: the factors' gradients at W' + N, N scaled row by row.

    Args:
        rho: the radius as the schedule makes it.
        normal: standard normal numbers (m, n) of each layer.
    """
    weights = []
    for layer, z in zip(net.layers, normal, strict=True):
        W = layer.weight()
        noise = torch.empty_like(W)
        for i in range(W.shape[0]):
            # A row of n numbers gets noise of the norm rho ||W_i|| in the mean.
            noise[i] = z[i] * (rho * float((W[i] ** 2).sum().sqrt()) / math.sqrt(W.shape[1]))
        weights.append(W + noise)
    loss, gradients = net.gradients(x, y, weights)
    net.descend(gradients)
    return loss


def clip(layers: list[Layer], rho: float, scaled: bool = True) -> float:
    """Line 8 of Algorithm 1, Eq. 10, every product formed. Returns the norm before."""
    c = norm(layer.change(scaled) for layer in layers)
    if c > rho:
        for layer in layers:
            layer.B2 = math.sqrt(rho / c) * layer.B2  # pyright: ignore
            layer.A2 = math.sqrt(rho / c) * layer.A2  # pyright: ignore
    return c


def bilora(net: Net, x: Tensor, y: Tensor, rho: float, scaled: bool = True) -> float:
    """Algorithm 1."""
    loss = lora(net, x, y)
    is_outside = clip(net.layers, rho, scaled) > rho
    net.numbers.setdefault("outside", []).append(float(is_outside))
    return loss
