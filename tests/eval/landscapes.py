"""Losses whose curvature is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.landscape.weights import Weight


class Quadratic:
    """L(w) = w^T H w / 2 + b^T w + 3 in float64, w being a (4, 3) and a (2, 4) matrix, filters the
    rows of one and the columns of the other; H has eigenvalues of both signs unless told.
    """

    def __init__(self, seed: int, convex: bool = False) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.tensors = [draw(4, 3), draw(2, 4)]
        self.weights = [Weight("a", self.tensors[0], 0), Weight("b", self.tensors[1], 1)]
        root = draw(20, 20)
        matrix = root @ root.T if convex else root + root.T
        self._matrix, self._slope = matrix, draw(20)

    def loss(self) -> Tensor:
        w = torch.cat([tensor.flatten() for tensor in self.tensors])
        return w @ self._matrix @ w / 2 + self._slope @ w + 3

    @property
    def hessian(self) -> Any:
        return self._matrix.numpy()

    def flat(self, parts: Iterable[Tensor]) -> Any:
        return np.concatenate([part.detach().numpy().ravel() for part in parts])

    def gradient(self) -> Any:
        return self.hessian @ self.flat(self.tensors) + self._slope.numpy()
