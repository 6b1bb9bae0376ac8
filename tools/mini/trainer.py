"""The pretraining loop that the VAE and the text-to-image stage share: schedule, EMA, atomic
checkpoints.

A step is a function of (seed, step) and the weights only, so a run that is killed and started again
continues as if nothing had happened: bit for bit on the same machine with the same number of
threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains. ``decay_fraction`` is the part of the steps under the
    cosine.
    """

    steps: int
    learning_rate: float
    decay_fraction: float
    ema_decay: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    checkpoint_seconds: float = 180.0
    log_every: int = 50


def generator_for(stage: str, seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: independent of what was drawn before it."""
    digest = hashlib.sha256(f"{stage}:{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def learning_rate_at(step: int, plan: Plan) -> float:
    """Linear warm-up, constant, then a half cosine to zero over the last ``decay_fraction`` of the
    steps.
    """
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    decay_start = plan.steps * (1 - plan.decay_fraction)
    progress = max(0.0, step - decay_start) / max(1.0, plan.steps - decay_start)
    return plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay_at(step: int, plan: Plan) -> float:
    """The averaging window grows with the run, so that the first random weights are forgotten."""
    return min(plan.ema_decay, (1 + step) / (10 + step))


class Run:
    """A stage in training: the module, its averaged weights, its optimizer and the step reached."""

    def __init__(self, module: nn.Module, plan: Plan, identity: dict[str, object]) -> None:
        self.module, self.plan, self.step = module, plan, 0
        self.identity = json.dumps(identity, sort_keys=True)
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = [parameter for _, parameter in module.named_parameters()]
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        # Embeddings, norms and biases are not decayed: decay would also shrink tokens that are
        # never seen, like "tok".
        decayed = [p for n, p in module.named_parameters() if p.ndim > 1 and "embedding" not in n]
        rest = [p for n, p in module.named_parameters() if p.ndim <= 1 or "embedding" in n]
        groups = [
            {"params": decayed, "weight_decay": plan.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True
        )

    def update(self, loss: Tensor) -> None:
        """One optimizer step on ``loss`` and one step of the average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.plan.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.plan)
        self.optimizer.step()
        with torch.no_grad():
            weight = 1 - ema_decay_at(self.step, self.plan)
            torch._foreach_lerp_(self.ema, [p.data for p in self.parameters], weight)
        self.step += 1

    def save(self, path: Path) -> None:
        """Write everything a restart needs, through a temporary file, so that a kill cannot leave
        half a checkpoint.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter, average in zip(self.names, self.parameters, self.ema, strict=True):
            tensors[f"model/{name}"] = parameter.detach().contiguous()
            tensors[f"ema/{name}"] = average.contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.contiguous()
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(self.step), "identity": self.identity})
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from ``path``.

        Raises:
            ValueError: the checkpoint was written with other settings.
        """
        with safe_open(path, framework="pt") as file, torch.no_grad():
            metadata = file.metadata()
            if metadata["identity"] != self.identity:
                raise ValueError(
                    f"{path} belongs to other settings ({metadata['identity']}); "
                    "use another --output_dir or delete it"
                )
            stored = set(file.keys())
            for name, parameter, average in zip(self.names, self.parameters, self.ema, strict=True):
                parameter.copy_(file.get_tensor(f"model/{name}"))
                average.copy_(file.get_tensor(f"ema/{name}"))
                keys = [
                    key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in stored
                ]
                if keys:
                    values = {key: file.get_tensor(f"{key}/{name}") for key in keys}
                    for key in ("exp_avg", "exp_avg_sq"):  # keep the memory format of the parameter
                        values[key] = torch.empty_like(parameter).copy_(values[key])
                    self.optimizer.state[parameter] = values
            self.step = int(metadata["step"])

    @torch.no_grad()
    def use_average(self) -> None:
        """Replace the weights by their average: what is kept in the end."""
        for parameter, average in zip(self.parameters, self.ema, strict=True):
            parameter.copy_(average)


def fit(
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    plan: Plan,
    checkpoint: Path,
    identity: dict[str, object],
    stop_after: int | None = None,
) -> float:
    """Train ``module`` in place and leave the averaged weights in it.

    Args:
        loss_at: the loss of a step; all its randomness must come from the step's number.
        checkpoint: written every ``plan.checkpoint_seconds`` and at the end; continued from if it
            exists.
        identity: settings under which a checkpoint may be continued.
        stop_after: leave after this many steps of this call, with a checkpoint (as a kill would);
            for the tests.

    Returns:
        Mean seconds per step of this call.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint stays as it is.
    """
    run = Run(module, plan, identity)
    if checkpoint.is_file():
        run.restore(checkpoint)
    first, last = (
        run.step,
        plan.steps if stop_after is None else min(plan.steps, run.step + stop_after),
    )
    started = saved = time.monotonic()
    smooth: float | None = None
    progress = tqdm(
        initial=first, total=plan.steps, desc=checkpoint.stem, mininterval=30.0, maxinterval=60.0
    )
    module.train()
    while run.step < last:
        loss = loss_at(run.step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{checkpoint.stem}: the loss is {value} at step {run.step}; "
                "the last checkpoint is kept"
            )
        run.update(loss)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        progress.update()
        if run.step % plan.log_every == 0:
            seconds = (time.monotonic() - started) / (run.step - first)
            rate = learning_rate_at(run.step - 1, plan)
            progress.write(
                f"{checkpoint.stem} step {run.step}: loss {smooth:.5f}, "
                f"lr {rate:.2e}, {seconds:.3f} s/step"
            )
        if time.monotonic() - saved > plan.checkpoint_seconds:
            run.save(checkpoint)
            saved = time.monotonic()
    seconds = (time.monotonic() - started) / max(1, run.step - first)
    progress.close()
    if run.step > first:
        run.save(checkpoint)
    run.use_average()
    module.eval()
    return seconds
