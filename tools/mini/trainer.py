"""The loop that pretrains each of the miniature's parts: schedule, average, checkpoints.

A step is a function of (seed, step) and the weights only, so a run that is killed and started again
continues as if nothing had happened: bit for bit on the same machine with the same number of
threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from bilora_diffusion.durable import replacing
from bilora_diffusion.run import state_codec
from bilora_diffusion.train.averaging import Average

LOG_EVERY = 50


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


def generator_for(stage: str, seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: independent of what was drawn before it.

    The key is not that of ``bilora_diffusion.seeds``: the shipped weights were drawn with this one.
    """
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


class Run:
    """A stage in training: the module, its averaged weights, its optimizer and the step reached."""

    def __init__(self, module: nn.Module, plan: Plan, identity: dict[str, object]) -> None:
        self.module, self.plan, self.step = module, plan, 0
        self.identity = json.dumps(identity, sort_keys=True)
        self.parameters = dict(module.named_parameters())
        self.average = Average([*self.parameters.values()], plan.ema_decay)
        # Embeddings, norms and biases are not decayed: decay would also shrink tokens that are
        # never seen, like "tok".
        decayed = {n: p for n, p in self.parameters.items() if p.ndim > 1 and "embedding" not in n}
        rest = [p for n, p in self.parameters.items() if n not in decayed]
        groups = [
            {"params": [*decayed.values()], "weight_decay": plan.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True
        )

    def update(self, loss: Tensor) -> None:
        """One optimizer step on ``loss`` and one step of the average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.plan)
        self.optimizer.step()
        self.average.update()
        self.step += 1

    def save(self, path: Path) -> None:
        """Write everything a restart needs, so that a kill cannot leave half a checkpoint."""
        state = {"step": self.step, "average": self.average.state_dict()}
        tensors = state_codec.Tensors()
        optimizer = state_codec.encode(self.optimizer.state_dict(), "optimizer", tensors)
        named = tensors.named | self.average.tensors()
        named |= {f"model/{name}": value for name, value in self.parameters.items()}
        metadata = {
            "identity": self.identity,
            "state": json.dumps(state | {"optimizer": optimizer}),
        }
        with replacing(path) as aside:
            save_file(state_codec.separate(named.items()), aside, metadata=metadata)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Continue from ``path``.

        Raises:
            ValueError: the checkpoint was written with other settings.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if metadata["identity"] != self.identity:
            raise ValueError(
                f"{path} belongs to other settings ({metadata['identity']}); "
                "use another --output_dir or delete it"
            )
        state, tensors = json.loads(metadata["state"]), load_file(path)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
        for name, average in self.average.tensors().items():
            average.copy_(tensors[name])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state_codec.decode(state["optimizer"], tensors))
        for parameter, moments in self.optimizer.state.items():  # in the parameter's memory format
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = torch.empty_like(parameter).copy_(moments[key])
        self.step = state["step"]


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
    first = run.step
    last = plan.steps if stop_after is None else min(plan.steps, first + stop_after)
    started = saved = time.monotonic()
    progress = tqdm(initial=first, total=plan.steps, desc=checkpoint.stem, mininterval=30.0)
    module.train()
    while run.step < last:
        loss = loss_at(run.step)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"{checkpoint.stem}: the loss is {loss.item()} at step {run.step}; "
                "the last checkpoint is kept"
            )
        run.update(loss)
        progress.update()
        if run.step % LOG_EVERY == 0:
            progress.write(f"{checkpoint.stem} step {run.step}: loss {loss.item():.5f}")
        if time.monotonic() - saved > plan.checkpoint_seconds:
            run.save(checkpoint)
            saved = time.monotonic()
    seconds = (time.monotonic() - started) / max(1, run.step - first)
    progress.close()
    if run.step > first:
        run.save(checkpoint)
    with torch.no_grad():
        for parameter, average in zip(
            run.parameters.values(), run.average.tensors().values(), strict=True
        ):
            parameter.copy_(average)
    module.eval()
    return seconds
