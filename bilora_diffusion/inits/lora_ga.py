"""LoRA-GA: the adapter starts along the singular vectors of the loss's gradient.

Source: Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation
(https://arxiv.org/abs/2407.05000), Theorem 3.1, Section 3.3 and Algorithm 1, as its authors run it.
"""

from __future__ import annotations

from torch import Tensor

from .pissa import seeded_svd, signs

GAMMA = 16.0
OVERSAMPLING, ITERATIONS = 4, 4


def lora_ga(gradient: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A0 = c V[1..r]^T and B0 = c U[r+1..2r] with c = m^(1/4) / sqrt(GAMMA), where G = U S V^T.

    With A0 and B0 from different components, r for the rows and r for the columns, the first step
    of the adapter is the best approximation of rank 2r of the full gradient's step (Theorem 3.1);
    c keeps the size of the output independent of that of the layer (Section 3.3). The largest
    entry of each component is positive.

    Args:
        gradient: G = dL/dW, the mean over some samples, (m, n); its scale plays no part.
        rank: r <= min(m, n) / 2.
        seed: of the randomized decomposition.

    Returns:
        A0 (r, n) and B0 (m, r).
    """
    m = gradient.shape[0]
    size = min(OVERSAMPLING * rank, *gradient.shape)
    U, _, V = seeded_svd(gradient, size, ITERATIONS, seed)
    c = m**0.25 / GAMMA**0.5
    V, U = V[:, :rank], U[:, rank : 2 * rank]
    return c * (V * signs(V)).T, c * (U * signs(U))
