"""What memory a run takes, phase by phase and part by part, and whether the device has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..durable import bytes_for_people
from .memory import Moment, Phase

TRAINING = "training"


@dataclass(frozen=True)
class Estimate:
    """What memory a run takes.

    Attributes:
        device: on which it computes.
        phases: in their order.
        process: bytes that the process takes beside its tensors.
        free: bytes that tensors can still take on the device.
    """

    device: torch.device
    phases: tuple[Phase, ...]
    process: int
    free: int

    @property
    def highest(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: self.of(phase).total)

    def of(self, phase: Phase) -> Moment:
        """A phase's peak on the device."""
        return phase.peaks.get(self.device.type, Moment({}))

    @property
    def peak(self) -> int:
        """The most that the device has to hold, the process's own part included."""
        return self.of(self.highest).total + self.process

    @property
    def fits(self) -> bool:
        """Whether the tensors of the highest phase fit into what is free."""
        return self.of(self.highest).total <= self.free


def said(estimate: Estimate) -> list[str]:
    """The estimate as a table and a verdict."""
    highest = estimate.highest
    kind = estimate.device.type
    own = "CUDA's context, assumed" if kind == "cuda" else "the process itself, measured now"
    parts = sorted(estimate.of(highest).parts.items(), key=lambda item: -item[1])
    rows = [*parts, (own, estimate.process), ("peak", estimate.peak)]
    width = max(len(name) for name, _ in rows)
    lines = [f"memory of {kind}, part by part, when it is highest ({highest.name}):"]
    lines += [f"  {name:<{width}}  {bytes_for_people(size):>8}" for name, size in rows if size]
    lines += ["", "peak of each phase:"]
    for phase in estimate.phases:
        whole = bytes_for_people(estimate.of(phase).total + estimate.process)
        lines.append(f"  {phase.name:<{width}}  {whole:>8}")
    step = next((phase for phase in estimate.phases if phase.name == TRAINING), None)
    if step is not None:
        lines += ["", f"activations kept for backward: {bytes_for_people(step.activations)}"]
    return [*lines, "", verdict(estimate)]


def verdict(estimate: Estimate) -> str:
    """Whether it fits, as one sentence."""
    room = estimate.free + estimate.process
    words = f"the run needs about {bytes_for_people(estimate.peak)}, and {estimate.device.type} has"
    words += f" {bytes_for_people(room)} for it"
    if estimate.fits:
        return f"It fits: {words}."
    return (
        f"It does not fit: {words}; try --gradient_checkpointing, a smaller --train_batch_size,"
        " --quantize nf4, or a smaller model."
    )
