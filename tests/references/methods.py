"""The methods word for word: full weight matrices, gradients of W by hand, one layer after another.

Slow and literal on purpose; written from the papers' formulas, without the product's code. The
network is layer2(tanh(layer1(x))) with the mean squared error. A method is a function that takes
one step of a `Net` on rows x and y and returns the loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

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
        m_hat, v_hat = self.m / (1 - self.beta1**self.k), self.v / (1 - self.beta2**self.k)
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
        return parameter + (self.lr if self.ascend else -self.lr) * gradient


Gradients = list[dict[str, Tensor]]
Rules = Sequence[Mapping[str, SGD | AdamW]]


@dataclass
class Net:
    """Two layers with the optimizer of each matrix, the number of the step from 0, and what a
    method remembers.
    """

    layers: list[Layer]
    rules: Rules
    k: int = 0
    memory: Gradients = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def gradients(
        self, x: Tensor, y: Tensor, weights: Sequence[Tensor] = ()
    ) -> tuple[float, Gradients]:
        """The loss and the gradients of all factors, at the layers' own weights or at others."""
        loss, full = backward(weights or [la.weight() for la in self.layers], self.layers, x, y)
        return loss, [to_factors(la, g["W0"]) for la, g in zip(self.layers, full, strict=True)]

    def moved(self, factor: float, direction: Gradients) -> Self:
        """The same with its factors moved."""
        current = [{name: getattr(la, name) for name in d} for la, d in self.layer_pairs(direction)]
        pairs = self.layer_pairs(plus(current, factor, direction))
        return replace(self, layers=[replace(la, **factors) for la, factors in pairs])

    def layer_pairs(self, values: Gradients) -> Iterable[tuple[Layer, dict[str, Tensor]]]:
        return zip(self.layers, values, strict=True)

    def descend(self, gradients: Gradients) -> None:
        """One step of the optimizer on everything that has a gradient, all at once."""
        for (layer, gradient), rule in zip(self.layer_pairs(gradients), self.rules, strict=True):
            for name, value in gradient.items():
                setattr(layer, name, rule[name].update(getattr(layer, name), value))


def backward(
    weights: Sequence[Tensor], layers: list[Layer], x: Tensor, y: Tensor
) -> tuple[float, Gradients]:
    """The loss at these weights, and dL/dW0 (m, n) and dL/db (m,) by the chain rule."""
    hidden = torch.tanh(x @ weights[0].T + layers[0].b)
    output = hidden @ weights[1].T + layers[1].b
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
        gradients |= {"A2": layer.s2 * layer.B2.T @ dW, "B2": layer.s2 * dW @ layer.A2.T}
    return gradients


def inner(left: Gradients, right: Gradients) -> float:
    pairs = zip(left, right, strict=True)
    return sum(float((a[name] * b[name]).sum()) for a, b in pairs for name in a)


def length(tensors: Gradients) -> float:
    return math.sqrt(inner(tensors, tensors))


def plus(left: Gradients, factor: float, right: Gradients) -> Gradients:
    pairs = zip(left, right, strict=True)
    return [{name: a[name] + factor * b[name] for name in a} for a, b in pairs]


def lora(net: Net, x: Tensor, y: Tensor) -> float:
    """Plain LoRA, or line 7 of Algorithm 1 where there is an auxiliary."""
    loss, gradients = net.gradients(x, y)
    net.descend(gradients)
    return loss


def full(net: Net, x: Tensor, y: Tensor) -> float:
    """Full fine-tuning: the optimizer's step on W0 and b themselves."""
    loss, gradients = backward([la.W0 for la in net.layers], net.layers, x, y)
    net.descend(gradients)
    return loss


def sam_gradients(net: Net, x: Tensor, y: Tensor, rho: float) -> tuple[float, Gradients]:
    """Equations 3 to 5 on the factors: e = rho g / ||g||, then the gradient at A + e_A, B + e_B."""
    loss, g = net.gradients(x, y)
    return loss, net.moved(rho / length(g), g).gradients(x, y)[1]


def lora_sam(net: Net, x: Tensor, y: Tensor, rho: float) -> float:
    loss, perturbed = sam_gradients(net, x, y, rho)
    net.descend(perturbed)
    return loss


def lora_l2sp(net: Net, x: Tensor, y: Tensor, strength: float) -> float:
    """The gradient of L + strength sum_i ||W_i - W_i(0)||_F^2; it remembers the first weights."""
    weights = [la.weight() for la in net.layers]
    net.memory = net.memory or [{"W": W} for W in weights]
    loss, full = backward(weights, net.layers, x, y)
    parts = zip(net.layers, full, weights, net.memory, strict=True)
    net.descend([to_factors(la, g["W0"] + 2 * strength * (W - m["W"])) for la, g, W, m in parts])
    return loss


def bar(net: Net, x: Tensor, y: Tensor, kind: str, strength: float) -> float:
    """oBAR and nBAR: balance each layer, then take the optimizer's step with the same gradient."""
    loss, gradients = net.gradients(x, y)
    for (layer, g), rule in zip(net.layer_pairs(gradients), net.rules, strict=True):
        if kind == "oBAR":
            A_shrinks = float(layer.A.norm()) >= float(layer.B.norm())
        else:
            A_shrinks = not float(g["A"].norm()) >= float(g["B"].norm())
        share = strength * rule["A"].lr * (-1 if A_shrinks else 1)
        layer.A, layer.B = layer.A * (1 + share), layer.B * (1 - share)
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
            noise[i] = z[i] * (rho * float((W[i] ** 2).sum().sqrt()) / math.sqrt(W.shape[1]))
        weights.append(W + noise)
    loss, gradients = net.gradients(x, y, weights)
    net.descend(gradients)
    return loss


def clip(layers: list[Layer], rho: float, scaled: bool = True) -> float:
    """Line 8 of Algorithm 1, Eq. 10, every product formed. Returns the norm before."""
    c = math.sqrt(sum(float((la.change(scaled) ** 2).sum()) for la in layers))
    for layer in layers if c > rho else ():
        layer.B2 = math.sqrt(rho / c) * layer.B2  # pyright: ignore
        layer.A2 = math.sqrt(rho / c) * layer.A2  # pyright: ignore
    return c


def bilora(
    net: Net, x: Tensor, y: Tensor, rho: float, ball: str = "global", scaled: bool = True
) -> float:
    """Algorithm 1; its ablation "per-layer" gives each layer a ball of rho / sqrt(layers)."""
    loss = lora(net, x, y)
    balls = {"global": [net.layers], "per-layer": [[la] for la in net.layers], "none": []}[ball]
    bound = rho / math.sqrt(len(balls) or 1)
    outside = max([clip(layers, bound, scaled) for layers in balls] or [math.inf]) > bound
    net.numbers.setdefault("outside", []).append(float(outside))
    return loss


def auto_radius(
    net: Net, x: Tensor, y: Tensor, tau: float, largest_share: float, scaled: bool = True
) -> float:
    """Bi-LoRA with a radius that is found anew before each projection.

    Args:
        tau: the share of the loss by which the auxiliary is to move it.
        largest_share: the largest share of the norm of the primary's change that the radius may be.
    """
    _, full = backward([la.weight() for la in net.layers], net.layers, x, y)
    gamma = sum(float((g["W0"] * la.change()).sum()) for la, g in net.layer_pairs(full))
    loss = lora(net, x, y)
    primary = [(la.s if scaled else 1.0) * la.B @ la.A for la in net.layers]
    limit = largest_share * math.sqrt(sum(float((change**2).sum()) for change in primary))
    if not net.numbers:
        net.numbers = {"slopes": [], "losses": [], "outside": [], "radius": [0.0, 0.0]}
    if net.numbers["radius"][1] == 0:  # no step has moved the auxiliary yet
        rho = limit
    else:
        (rho, norm), slopes, losses = (net.numbers[n] for n in ("radius", "slopes", "losses"))
        slopes.append(gamma / norm)
        losses.append(loss)
        ages = [0.98**age for age in range(len(losses))][::-1]
        mean = sum(a * v for a, v in zip(ages, losses, strict=True)) / sum(ages)
        square = sum(a * v**2 for a, v in zip(ages, slopes, strict=True)) / sum(ages)
        ratio = math.sqrt(tau * mean / (rho * math.sqrt(square)))
        rho = min(rho * min(max(ratio, 0.9), 1.1), limit)
    before = clip(net.layers, rho, scaled)
    net.numbers["outside"].append(float(before > rho))
    norm = min(before, rho)
    net.numbers["radius"] = [norm if not net.numbers["losses"] else rho, norm]
    return loss


def by_sample(
    net: Net,
    x: Tensor,
    y: Tensor,
    rho: float,
    auxiliary_nets: list[Any],
    groups: Sequence[int | None],
    shares: Sequence[float],
) -> float:
    """Bi-LoRA with an auxiliary for each group of samples, one row after the other.

    `auxiliary_nets` hold A2 and B2 of each group, with their rules; a row sees a share of its
    group's, or none.
    """
    total, sums = 0.0, dict[int | None, Gradients]()
    for row, (group, share) in enumerate(zip(groups, shares, strict=True)):
        pairs: list[Any] = [{}, {}]
        if group is not None:
            pairs = [{"A2": la.A2, "B2": share * la.B2} for la in auxiliary_nets[group].layers]
        row_net = Net(
            [replace(la, **auxiliary_factors) for la, auxiliary_factors in net.layer_pairs(pairs)],
            net.rules,
        )
        loss, gradients = row_net.gradients(x[row : row + 1], y[row : row + 1])
        total += loss / len(x)
        for key in {None, group}:
            names = ("A", "B") if key is None else ("A2", "B2")
            times = {"B2": share}
            row_gradients = [
                {n: times.get(n, 1.0) * g[n] / len(x) for n in names} for g in gradients
            ]
            sums[key] = plus(sums[key], 1.0, row_gradients) if key in sums else row_gradients
    net.descend(sums.pop(None))
    for group, group_gradients in sums.items():
        auxiliary_nets[group or 0].descend(group_gradients)
        clip(auxiliary_nets[group or 0].layers, rho)
    return total
