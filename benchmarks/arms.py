"""The things that are compared: one method on one copy of a model, ready to take training steps."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from random_models import materialize
from shapes import Inputs, Shape
from torch import Tensor, nn

from bilora_diffusion import adapters, methods
from bilora_diffusion.adapters.fused import unfuse
from bilora_diffusion.methods import MethodOptions, Target
from bilora_diffusion.train.compiling import Blocks

MAX_GRAD_NORM = 1.0
SAMPLES = 20  # that have an auxiliary each; every step sees the next ones
SCHEDULED_STEPS = 10_000  # more than any benchmark takes: what schedules think a run has


class ArmKind(NamedTuple):
    """A row of the result; not fused is PEFT's own forward, compiled is as by ``--compile``."""

    label: str
    method: str
    fused: bool = True
    compiled: bool = False
    options: Mapping[str, Any] = MappingProxyType({})  # of the method, where not its defaults


METHODS = tuple(name for name in methods.names() if not methods.get(name).exports_weights)
"""Methods of `--methods all`: those that train adapters. `full` is run by name only."""
KINDS = {
    **{name: ArmKind(methods.get(name).title, name) for name in methods.names()},
    "bilora-auto": ArmKind("Bi-LoRA, rho auto", "bilora", options={"rho": "auto"}),
    "bilora-sample": ArmKind(
        "Bi-LoRA, an auxiliary for each of 20 samples", "bilora", options={"auxiliaries": SAMPLES}
    ),
    "bilora-peft": ArmKind("Bi-LoRA, PEFT's two adapters", "bilora", fused=False),
    "lora-peft": ArmKind("LoRA, PEFT's forward", "lora", fused=False),
    "bilora-compiled": ArmKind("Bi-LoRA, compiled", "bilora", compiled=True),
    "lora-compiled": ArmKind("LoRA, compiled", "lora", compiled=True),
}
BASELINE = "lora"


class Arm:
    """One method on its own copy of ``base``'s modules; the base weights are shared between arms,
    but for full fine-tuning, which gets its own.

    Args:
        kind: a key of ``KINDS``.
        base: the frozen model without adapters.
        inputs: the batch of every step, of `batch` rows.
        amp: dtype for autocast, or None; as the training script runs ``--mixed_precision``.
    """

    def __init__(
        self,
        kind: str,
        shape: Shape,
        base: nn.Module,
        inputs: Inputs,
        batch: int,
        amp: Any,
        seed: int,
    ) -> None:
        self.kind, self.shape, self.inputs, self.amp = kind, shape, inputs, amp
        self.batch = batch
        options = MethodOptions(num_steps=SCHEDULED_STEPS, **KINDS[kind].options)
        self.method = methods.create(KINDS[kind].method, options)
        self.model = copy.deepcopy(base) if self.method.exports_weights else share(base)
        torch.manual_seed(seed)  # every arm starts from the same primary
        groups = self.method.setup([Target("model", self.model, shape.spec, shape.lr, 1e-2)])
        if not KINDS[kind].fused:
            unfuse(self.model)
        self.optimizer = torch.optim.AdamW(groups, fused=True)  # as in training
        self.method.bind(self.optimizer)
        Blocks([self.model] if KINDS[kind].compiled else [])
        self.losses: list[float] = []
        self.layers = len(adapters.factors(self.model, adapters.PRIMARY))
        self.trainable = sum(p.numel() for group in groups for p in group["params"])

    def train_step(self) -> Tensor:
        """One whole step: forward, backward, clip, update with projection, gradients forgotten."""
        loss = self.method.step(self.forward_backward, self)
        self.zero_grad()
        return loss

    def step(self) -> None:
        """Clip what the method wants clipped, then update; called by the method."""
        torch.nn.utils.clip_grad_norm_(self.method.weights, MAX_GRAD_NORM)
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients; called by the method too."""
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> Tensor:
        """Loss and gradients of the batch; called by the method."""
        device = next(self.model.parameters()).device
        first = len(self.losses) * self.batch
        with self.method.seen([n % SAMPLES for n in range(first, first + self.batch)]):
            with torch.autocast(device.type, self.amp) if self.amp else contextlib.nullcontext():
                loss = self.shape.loss(self.model, self.inputs)
            loss.backward()
        return loss.detach()


def make(
    kinds: Sequence[str], shape: Shape, batch: int, dtype: torch.dtype, device: Any, seed: int
) -> list[Arm]:
    """Arms on one base model and one batch; under autocast, but for fp32."""
    base = materialize(shape.build, dtype=dtype, device=device, seed=seed)
    base.train().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    inputs = shape.inputs(base, batch, dtype, device, generator)
    amp = None if dtype == torch.float32 else dtype
    return [Arm(kind, shape, base, inputs, batch, amp, seed) for kind in kinds]


def share(base: nn.Module) -> nn.Module:
    """A copy of the modules that holds the very same parameters and buffers, so takes no memory."""
    shared: dict[int, Any] = {id(t): t for t in itertools.chain(base.parameters(), base.buffers())}
    return copy.deepcopy(base, shared)
