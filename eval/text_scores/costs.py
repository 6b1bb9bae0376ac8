"""The "Cost" of the paper's Table 3: gradient steps per training iteration, counted, not listed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from bilora_diffusion import methods
from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.methods.base import Target


@cache
def gradient_steps(method: str) -> int:
    """How often a method computes the gradient of one optimizer step, on a toy model.

    Raises:
        UserError: no such method.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2))
        trained = methods.create(method, methods.MethodOptions(num_steps=1))
        spec = AdapterSpec(rank=1, alpha=1, target_modules=("0",))
        optimizer = torch.optim.SGD(trained.setup([Target("toy", model, spec, 1e-3)]))
        trained.bind(optimizer)
        counted = 0

        def forward_backward() -> Tensor:
            nonlocal counted
            counted += 1
            loss = model(torch.ones(1, 2)).square().sum()
            loss.backward()
            return loss.detach()

        trained.step(forward_backward, optimizer)
    return counted
