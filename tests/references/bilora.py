"""Bi-LoRA word for word: full weight matrices, gradients of W by hand, one layer after the other.

Slow and literal on purpose; written from Eqs. 7-10 and Algorithm 1, without the product's code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Layer:
    """A frozen weight W0 (m, n), bias b (m,), and two adapters with scales s1 and s2."""

    W0: Tensor
    b: Tensor
    A1: Tensor
    B1: Tensor
    A2: Tensor
    B2: Tensor
    s1: float
    s2: float

    def weight(self) -> Tensor:
        """Equation 7, with the scales of LoRA."""
        return self.W0 + self.s1 * (self.B1 @ self.A1) + self.s2 * (self.B2 @ self.A2)


def loss_and_weight_gradients(
    layers: list[Layer], x: Tensor, y: Tensor
) -> tuple[float, list[Tensor]]:
    """Mean squared error of layer2(tanh(layer1(x))), and dL/dW of both by the chain rule."""
    first, second = layers
    hidden = torch.tanh(x @ first.weight().T + first.b)
    output = hidden @ second.weight().T + second.b
    d_output = 2 * (output - y) / y.numel()
    d_hidden = (d_output @ second.weight()) * (1 - hidden**2)
    return float(((output - y) ** 2).mean()), [d_hidden.T @ x, d_output.T @ hidden]


@dataclass
class AdamW:
    """Loshchilov and Hutter's AdamW for one matrix; `ascend` adds the update to the matrix."""

    lr: float
    weight_decay: float
    ascend: bool
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
        m_hat, v_hat = self.m / (1 - self.beta1**self.k), self.v / (1 - self.beta2**self.k)
        decayed = parameter - self.lr * self.weight_decay * parameter
        return decayed - self.lr * m_hat / (v_hat.sqrt() + self.eps)


@dataclass
class SGD:
    """Plain gradient steps for one matrix."""

    lr: float
    ascend: bool

    def update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The new value of the parameter."""
        return parameter + (self.lr if self.ascend else -self.lr) * gradient


def factor_gradients(layer: Layer, dW: Tensor) -> dict[str, Tensor]:
    """The gradients that stand in Eq. 9, times the scales."""
    return {
        "B1": layer.s1 * dW @ layer.A1.T,
        "A1": layer.s1 * layer.B1.T @ dW,
        "B2": layer.s2 * dW @ layer.A2.T,
        "A2": layer.s2 * layer.B2.T @ dW,
    }


Rules = Sequence[Mapping[str, "SGD | AdamW"]]


def step(layers: list[Layer], rules: Rules, x: Tensor, y: Tensor) -> float:
    """Line 7 of Algorithm 1, Eq. 9: all four factors move at once, from one gradient of W."""
    loss, gradients = loss_and_weight_gradients(layers, x, y)
    for layer, dW, rule in zip(layers, gradients, rules, strict=True):
        new = {
            name: rule[name].update(getattr(layer, name), gradient)
            for name, gradient in factor_gradients(layer, dW).items()
        }
        for name, value in new.items():
            setattr(layer, name, value)
    return loss


def c_norm(layers: list[Layer], scaled: bool) -> float:
    """c_norm below Eq. 10, every product formed."""
    total = 0.0
    for layer in layers:
        product = (layer.s2 if scaled else 1.0) * (layer.B2 @ layer.A2)
        total += float((product**2).sum())
    return math.sqrt(total)


def clip(layers: list[Layer], rho: float, scaled: bool) -> float:
    """Line 8 of Algorithm 1, Eq. 10. Returns the norm before."""
    c = c_norm(layers, scaled)
    if c > rho:
        for layer in layers:
            layer.B2 = math.sqrt(rho / c) * layer.B2
            layer.A2 = math.sqrt(rho / c) * layer.A2
    return c


def clip_each(layers: list[Layer], rho: float) -> None:
    """The ablation of Eq. 10 in which each layer has the ball of radius rho / sqrt(layers)."""
    for layer in layers:
        clip([layer], rho / math.sqrt(len(layers)), scaled=True)


@dataclass
class AutoRadius:
    """Bi-LoRA with a radius that sets itself, in plain numbers and full matrices.

    Args:
        layers: what is trained; the auxiliary is zero.
        tau: the share of the loss by which the auxiliary is to move it.
        rho_norm: what norms are taken in.
        most: the largest share of the norm of the primary's change that the radius may be.
    """

    layers: list[Layer]
    tau: float
    rho_norm: str
    most: float
    rho: float | None = None
    norm: float = 0.0
    slopes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def sizes(self, adapter: int) -> list[float]:
        """What each layer's ||B A|| of the adapter 1 or 2 is multiplied with."""
        if self.rho_norm == "unscaled":
            return [1.0 for _ in self.layers]
        return [layer.s1 if adapter == 1 else layer.s2 for layer in self.layers]

    def c(self) -> float:
        """The auxiliary's norm."""
        pairs = zip(self.sizes(2), self.layers, strict=True)
        return math.sqrt(sum(float(((s * own.B2 @ own.A2) ** 2).sum()) for s, own in pairs))

    def limit(self) -> float:
        """The largest radius: a share of the norm of the primary's change in the same measure."""
        pairs = zip(self.sizes(1), self.layers, strict=True)
        whole = sum(float(((s * own.B1 @ own.A1) ** 2).sum()) for s, own in pairs)
        return self.most * math.sqrt(whole)

    def step(self, rules: list[dict[str, SGD | AdamW]], x: Tensor, y: Tensor) -> dict[str, float]:
        """Algorithm 1 with the radius found anew before each projection."""
        _, gradients = loss_and_weight_gradients(self.layers, x, y)
        pairs = zip(gradients, self.layers, strict=True)
        gamma = sum(float((dW * (own.s2 * own.B2 @ own.A2)).sum()) for dW, own in pairs)
        loss = step(self.layers, rules, x, y)
        if self.rho is not None:
            self.slopes.append(gamma / self.norm)
            self.losses.append(loss)
            ages = [0.98**k for k in range(len(self.losses))][::-1]
            loss_mean = sum(a * v for a, v in zip(ages, self.losses, strict=True)) / sum(ages)
            square = sum(a * v**2 for a, v in zip(ages, self.slopes, strict=True)) / sum(ages)
            ratio = math.sqrt(self.tau * loss_mean / (self.rho * math.sqrt(square)))
            self.rho = min(self.rho * min(max(ratio, 0.9), 1.1), self.limit())
        before = self.c()
        bound = self.limit() if self.rho is None else self.rho
        factor = math.sqrt(min(1.0, bound / before))
        for layer in self.layers:
            layer.A2, layer.B2 = factor * layer.A2, factor * layer.B2
        self.norm = min(before, bound)
        self.rho = self.norm if self.rho is None else self.rho
        return {"loss": loss, "rho": self.rho, "norm_before": before}


@dataclass
class BySample:
    """Bi-LoRA with an auxiliary for each group of samples, one sample after the other.

    Args:
        layers: what is trained; their A2 and B2 are every auxiliary's first.
        rules: of the primary's A1 and B1, layer by layer.
        others: of each auxiliary's A2 and B2, group by group, layer by layer.
        rho: radius of each auxiliary's ball.
    """

    layers: list[Layer]
    rules: Sequence[Mapping[str, SGD | AdamW]]
    others: Sequence[Sequence[Mapping[str, SGD | AdamW]]]
    rho: float

    def __post_init__(self) -> None:
        self.pairs = [[(own.A2, own.B2) for own in self.layers] for _ in self.others]

    def with_auxiliary(self, group: int | None) -> list[Layer]:
        """The layers as a sample of the group sees them; without auxiliary for None."""
        if group is None:
            return [replace(own, B2=torch.zeros_like(own.B2)) for own in self.layers]
        pairs = zip(self.layers, self.pairs[group], strict=True)
        return [replace(own, A2=A2, B2=B2) for own, (A2, B2) in pairs]

    def step(self, x: Tensor, y: Tensor, groups: Sequence[int | None]) -> float:
        """Rows x and y whose samples are of these groups; the mean loss."""
        total = 0.0
        primary: list[dict[str, Any]] = [{"A1": 0.0, "B1": 0.0} for _ in self.layers]
        own: dict[int, list[dict[str, Any]]] = {}
        for row, group in enumerate(groups):
            seen = self.with_auxiliary(group)
            loss, gradients = loss_and_weight_gradients(seen, x[row : row + 1], y[row : row + 1])
            total += loss / len(groups)
            for i, (layer, dW) in enumerate(zip(seen, gradients, strict=True)):
                parts = factor_gradients(layer, dW / len(groups))
                for name in ("A1", "B1"):
                    primary[i][name] = primary[i][name] + parts[name]
                if group is not None:
                    sums = own.setdefault(group, [{"A2": 0.0, "B2": 0.0} for _ in self.layers])
                    for name in ("A2", "B2"):
                        sums[i][name] = sums[i][name] + parts[name]
        for layer, rule, sums in zip(self.layers, self.rules, primary, strict=True):
            for name, gradient in sums.items():
                setattr(layer, name, rule[name].update(getattr(layer, name), gradient))
        for group, found in own.items():
            moved = []
            rules = self.others[group]
            for (A2, B2), rule, sums in zip(self.pairs[group], rules, found, strict=True):
                moved.append((rule["A2"].update(A2, sums["A2"]), rule["B2"].update(B2, sums["B2"])))
            self.pairs[group] = moved
            within = self.with_auxiliary(group)
            clip(within, self.rho, scaled=True)
            self.pairs[group] = [(layer.A2, layer.B2) for layer in within]
        return total
