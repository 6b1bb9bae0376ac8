"""What a micro-batch's inputs go through on their way to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilora_diffusion.train import task
from bilora_diffusion.train.task import MicroBatch


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_gpus_copies_come_from_pinned_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPU nor its memory is here, so both are made up."""
    told: dict[str, Any] = {}

    def send(inputs: Any, device: torch.device, non_blocking: bool) -> Any:
        told.update(device=device, non_blocking=non_blocking)
        return inputs

    monkeypatch.setattr(task, "send_to_device", send)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    batch = MicroBatch((0,), ("a",), ("",), {"x": torch.zeros(1), "prior": {"y": torch.zeros(1)}})
    there = batch.on(torch.device(kind))
    is_gpu = kind == "cuda"
    assert told == {"device": torch.device(kind), "non_blocking": is_gpu}
    assert there == {"x": float(is_gpu), "prior": {"y": float(is_gpu)}}
    assert batch.inputs["x"] == 0
