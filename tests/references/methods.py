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


def lora_l2sp(net: Net, x: Tensor, y: Tensor, strength: float) -> float:
    """The gradient of L + strength sum_i ||W_i - W_i(0)||_F^2; it remembers the first weights."""
    weights = [layer.weight() for layer in net.layers]
    if not net.memory:
        net.memory = [{"W": W} for W in weights]
    loss, full = backward(weights, net.layers, x, y)
    gradients = []
    for i, layer in enumerate(net.layers):
        dW = full[i]["W0"] + 2 * strength * (weights[i] - net.memory[i]["W"])
        gradients.append(to_factors(layer, dW))
    net.descend(gradients)
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


def bilora(
    net: Net, x: Tensor, y: Tensor, rho: float, ball: str = "global", scaled: bool = True
) -> float:
    """Algorithm 1; its ablation "per-layer" gives each layer a ball of rho / sqrt(layers)."""
    loss = lora(net, x, y)
    if ball == "global":
        is_outside = clip(net.layers, rho, scaled) > rho
    elif ball == "per-layer":
        bound = rho / math.sqrt(len(net.layers))
        norms = [clip([layer], bound, scaled) for layer in net.layers]
        is_outside = max(norms) > bound
    else:
        is_outside = True  # the tests want a ball to have been at work, and here is none
    net.numbers.setdefault("outside", []).append(float(is_outside))
    return loss


def auto_radius(
    net: Net, x: Tensor, y: Tensor, tau: float, largest_share: float, scaled: bool = True
) -> float:
    """Bi-LoRA with a radius that is found anew before each projection.

    Args:
        tau: the share of the loss by which the auxiliary is to move it.
        largest_share: the largest share of the norm of the primary's change that the radius may be.
    """
    # The change of the loss by the auxiliary to first order, <dL/dW, s2 B2 A2>.
    _, full = backward([layer.weight() for layer in net.layers], net.layers, x, y)
    gamma = 0.0
    for layer, gradient in zip(net.layers, full, strict=True):
        gamma += float((gradient["W0"] * layer.change()).sum())
    loss = lora(net, x, y)
    primary_changes = []
    for layer in net.layers:
        scale = layer.s if scaled else 1.0
        primary_changes.append(scale * layer.B @ layer.A)
    limit = largest_share * norm(primary_changes)
    if not net.numbers:
        net.numbers = {"slopes": [], "losses": [], "outside": [], "radius": [0.0, 0.0]}
    slopes = net.numbers["slopes"]
    losses = net.numbers["losses"]
    rho, auxiliary_norm = net.numbers["radius"]
    if auxiliary_norm == 0:  # no step has moved the auxiliary yet
        rho = limit
    else:
        slopes.append(gamma / auxiliary_norm)
        losses.append(loss)
        # Weighted means, in which each step counts 2 % less than the next.
        weights = [0.98**age for age in reversed(range(len(losses)))]
        loss_sum = sum(w * value for w, value in zip(weights, losses, strict=True))
        mean_loss = loss_sum / sum(weights)
        squares = sum(w * value**2 for w, value in zip(weights, slopes, strict=True))
        mean_slope = math.sqrt(squares / sum(weights))
        # At the radius that is sought, tau L = rho slope. A step goes half of the way there (in
        # the logarithm), and by 10 % at most.
        ratio = math.sqrt(tau * mean_loss / (rho * mean_slope))
        rho = min(rho * min(max(ratio, 0.9), 1.1), limit)
    norm_before = clip(net.layers, rho, scaled)
    net.numbers["outside"].append(float(norm_before > rho))
    auxiliary_norm = min(norm_before, rho)
    net.numbers["radius"] = [rho if losses else auxiliary_norm, auxiliary_norm]
    return loss


def by_sample(
    net: Net,
    x: Tensor,
    y: Tensor,
    rho: float,
    auxiliary_nets: list[Net],
    groups: Sequence[int | None],
    shares: Sequence[float],
) -> float:
    """Bi-LoRA with an auxiliary for each group of samples, one row after the other.

    Args:
        rho: of the ball of each group.
        auxiliary_nets: A2 and B2 of each group, with their rules.
        groups: of each row, whose auxiliary it sees; or None.
        shares: of each row: the part of its group's auxiliary that it sees.
    """
    rows = len(x)
    total_loss = 0.0
    primary_sum: Gradients = [{}, {}]
    group_sums: dict[int, Gradients] = {}
    for row, (group, share) in enumerate(zip(groups, shares, strict=True)):
        layers = net.layers
        if group is not None:
            layers = []
            for layer, auxiliary in zip(net.layers, auxiliary_nets[group].layers, strict=True):
                assert auxiliary.B2 is not None
                layers.append(replace(layer, A2=auxiliary.A2, B2=share * auxiliary.B2))
        loss, gradients = Net(layers, net.rules).gradients(x[row : row + 1], y[row : row + 1])
        total_loss += loss / rows
        for index, gradient in enumerate(gradients):
            add(primary_sum[index], "A", gradient["A"] / rows)
            add(primary_sum[index], "B", gradient["B"] / rows)
            if group is not None:
                group_sum = group_sums.setdefault(group, [{}, {}])[index]
                add(group_sum, "A2", gradient["A2"] / rows)
                # The row saw share * B2, so that dL/dB2 has the factor as well.
                add(group_sum, "B2", share * gradient["B2"] / rows)
    net.descend(primary_sum)
    for group, gradients in group_sums.items():
        auxiliary_nets[group].descend(gradients)
        clip(auxiliary_nets[group].layers, rho)
    return total_loss


def add(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    """Add to a sum, which begins at zero."""
    sums[name] = sums.get(name, 0.0) + gradient
