"""The methods, literally: full weight matrices, gradients of W by hand, layer by layer.

Slow on purpose. Written from the papers' formulas, without the product's code. The
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
    """A weight W0 (m, n), a bias b (m,), an adapter with scale s, and optionally an auxiliary."""

    W0: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    s: float
    A2: Tensor | None = None
    B2: Tensor | None = None
    s2: float = 0.0

    def change(self, scaled: bool = True) -> Tensor:
        """Return the auxiliary's change of the weight."""
        if self.A2 is None or self.B2 is None:
            return torch.zeros_like(self.W0)
        return (self.s2 if scaled else 1.0) * (self.B2 @ self.A2)

    def weight(self) -> Tensor:
        """Return the weight of Eq. 7, with LoRA's scales."""
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
        """Return the new value of the parameter."""
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
        """Return the new value of the parameter."""
        if self.ascend:
            gradient = -gradient
        return parameter - self.lr * gradient


Gradients = list[dict[str, Tensor]]
"""One tensor per matrix, for each layer: gradients, or a direction."""
Rules = Sequence[Mapping[str, SGD | AdamW]]


@dataclass
class Net:
    """Two layers, an optimizer for each matrix, the step number from 0, and recorded numbers."""

    layers: list[Layer]
    rules: Rules
    k: int = 0
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def gradients(
        self, x: Tensor, y: Tensor, weights: Sequence[Tensor] = ()
    ) -> tuple[float, Gradients]:
        """Return the loss and all factors' gradients, at the layers' own weights by default."""
        weights = weights or [layer.weight() for layer in self.layers]
        loss, full = backward(weights, self.layers, x, y)
        pairs = zip(self.layers, full, strict=True)
        return loss, [to_factors(layer, gradient["W0"]) for layer, gradient in pairs]

    def moved(self, factor: float, direction: Gradients) -> Self:
        """Return the same net with its factors moved along a direction."""
        layers = []
        for layer, vectors in zip(self.layers, direction, strict=True):
            factors = {name: getattr(layer, name) + factor * v for name, v in vectors.items()}
            layers.append(replace(layer, **factors))
        return replace(self, layers=layers)

    def descend(self, gradients: Gradients) -> None:
        """Take an optimizer step on every matrix that has a gradient."""
        for layer, rule, gradient in zip(self.layers, self.rules, gradients, strict=True):
            for name, value in gradient.items():
                setattr(layer, name, rule[name].update(getattr(layer, name), value))


def backward(
    weights: Sequence[Tensor], layers: list[Layer], x: Tensor, y: Tensor
) -> tuple[float, Gradients]:
    """Return the loss at these weights, and dL/dW0 (m, n) and dL/db (m,) by the chain rule.

    Args:
        weights: weights of both layers, which replace their own.
        layers: layers that provide the biases.
        x: inputs of the first layer, (rows, n).
        y: targets of the second layer, (rows, m).
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
    """Return the gradients of Eq. 9, times the scales."""
    gradients = {"A": layer.s * layer.B.T @ dW, "B": layer.s * dW @ layer.A.T}
    if layer.A2 is not None and layer.B2 is not None:
        gradients["A2"] = layer.s2 * layer.B2.T @ dW
        gradients["B2"] = layer.s2 * dW @ layer.A2.T
    return gradients


def norm(matrices: Iterable[Tensor]) -> float:
    """Return the joint norm of all matrices."""
    return math.sqrt(sum(float((matrix**2).sum()) for matrix in matrices))


def lora(net: Net, x: Tensor, y: Tensor) -> float:
    """Take a step of LoRA, or of line 7 of Algorithm 1 if there is an auxiliary."""
    loss, gradients = net.gradients(x, y)
    net.descend(gradients)
    return loss


def full(net: Net, x: Tensor, y: Tensor) -> float:
    """Take a step of full fine-tuning, which updates W0 and b themselves."""
    loss, gradients = backward([layer.W0 for layer in net.layers], net.layers, x, y)
    net.descend(gradients)
    return loss


def lora_sam(net: Net, x: Tensor, y: Tensor, rho: float) -> float:
    """Take a step of Eqs. 3 to 5: e = rho g / ||g||, then the gradient at A + e_A and B + e_B."""
    loss, g = net.gradients(x, y)
    length = norm(matrix for gradient in g for matrix in gradient.values())
    perturbed_net = net.moved(rho / length, g)
    _, perturbed_gradients = perturbed_net.gradients(x, y)
    net.descend(perturbed_gradients)
    return loss


def bar(net: Net, x: Tensor, y: Tensor, kind: str, strength: float) -> float:
    """Take a step of oBAR or nBAR: balance each layer, then update with the same gradient."""
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
    """Take a step of Flat-LoRA with gradients at W' + N, where N is scaled row by row.

    Args:
        rho: radius in this step, according to the schedule.
        normal: standard normal numbers (m, n) for each layer.
    """
    weights = []
    for layer, z in zip(net.layers, normal, strict=True):
        W = layer.weight()
        noise = torch.empty_like(W)
        for i in range(W.shape[0]):
            # On average, the noise of row i has the norm rho ||W_i||.
            noise[i] = z[i] * (rho * float((W[i] ** 2).sum().sqrt()) / math.sqrt(W.shape[1]))
        weights.append(W + noise)
    loss, gradients = net.gradients(x, y, weights)
    net.descend(gradients)
    return loss


def clip(layers: list[Layer], rho: float, scaled: bool = True) -> float:
    """Apply line 8 of Algorithm 1 (Eq. 10) with explicit products; return the norm before it."""
    c = norm(layer.change(scaled) for layer in layers)
    if c > rho:
        for layer in layers:
            layer.B2 = math.sqrt(rho / c) * layer.B2  # pyright: ignore
            layer.A2 = math.sqrt(rho / c) * layer.A2  # pyright: ignore
    return c


def bilora(net: Net, x: Tensor, y: Tensor, rho: float, scaled: bool = True) -> float:
    """Take a step of Algorithm 1 and record whether line 7 left the ball."""
    loss = lora(net, x, y)
    is_outside = clip(net.layers, rho, scaled) > rho
    net.numbers.setdefault("outside", []).append(float(is_outside))
    return loss
