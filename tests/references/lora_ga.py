"""LoRA-GA, literally and in float64: gradients by hand for each sample, full decompositions.

Slow on purpose. Written from Section 3 and Algorithm 1 of Wang et al. 2024
(https://arxiv.org/abs/2407.05000), without the product's code.
"""

import math

import torch
from torch import Tensor


def mean_gradients(W1: Tensor, W2: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return dL/dW1 and dL/dW2, sample by sample: L = mean_i ||W2 tanh(W1 x_i) - y_i||^2."""
    total1 = torch.zeros_like(W1)
    total2 = torch.zeros_like(W2)
    for i in range(len(x)):
        hidden = torch.tanh(W1 @ x[i])
        # tanh' = 1 - tanh^2
        d_output = 2 * (W2 @ hidden - y[i])
        total2 += torch.outer(d_output, hidden)
        total1 += torch.outer((W2.T @ d_output) * (1 - hidden**2), x[i])
    return [total1 / len(x), total2 / len(x)]


def initial_factors(G: Tensor, r: int, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """Return A0 = z V[1:r]^T and B0 = z U[r+1:2r] with z = d_out^(1/4) / sqrt(gamma)."""
    d_out = G.shape[0]
    U, _, Vt = torch.linalg.svd(G)
    zeta = math.sqrt(math.sqrt(d_out)) / math.sqrt(gamma)
    A0 = torch.stack([zeta * Vt[k] for k in range(r)])
    B0 = torch.stack([zeta * U[:, k] for k in range(r, 2 * r)], dim=1)
    return A0, B0


def initial_weight(W0: Tensor, A0: Tensor, B0: Tensor, alpha: float) -> Tensor:
    """Return W_init = W0 - (alpha / r) B0 A0."""
    return W0 - alpha / A0.shape[0] * (B0 @ A0)
