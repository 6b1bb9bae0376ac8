"""room: how much a run will write, and what is said where it plainly does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bilora_diffusion import room

MB = 10**6


def trainer(**options: Any) -> Any:
    cfg = {
        **{"use_8bit_adam": False, "optimizer": "adamw", "checkpointing_steps": 100},
        **{"checkpoints_total_limit": 2, "validation_epochs": 25, "sampled_prompts": []},
        **{"resolution": 1000, **options},
    }
    weights = {"w": torch.zeros(1, device="meta").expand(250_000)}  # 1 MB in fp32
    return SimpleNamespace(
        cfg=SimpleNamespace(**cfg),
        method=SimpleNamespace(tensors=lambda: weights),
        dynamics=None,
        step=0,
        num_steps=1000,
        task=SimpleNamespace(num_samples=8),
        schedule=SimpleNamespace(step_size=4),
    )


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 3 * 3 + 1),  # two checkpoints and a third in the making, with both moments
        ({"checkpoints_total_limit": 0}, 10 * 3 + 1),
        ({"checkpoints_total_limit": 1, "optimizer": "prodigy"}, 2 * 5 + 1),
        ({"checkpointing_steps": 1001}, 1),
        # an epoch has 2 steps: 20 validations of 3 images
        ({"checkpointing_steps": 1001, "sampled_prompts": ["a", "b", "c"]}, 1 + 60 * room.PNG),
    ],
)
def test_what_a_run_will_write(options: dict[str, Any], least: float) -> None:
    found = room.needs(trainer(**options))
    assert least * MB <= found <= (least + 0.5) * MB


@pytest.mark.parametrize(("left", "warned"), [(5 * MB, True), (50 * MB, False), (None, False)])
def test_a_run_that_will_not_fit_is_warned_about_at_the_start(
    left: int | None,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(room, "free", lambda path: left)
    room.warn(trainer(), tmp_path)
    assert bool(caplog.records) is warned
    if warned:
        message = caplog.records[0].message
        assert str(tmp_path) in message
        assert "5 MB" in message
        assert "10.4 MB" in message


def test_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    there = room.free(tmp_path / "not" / "yet")
    assert there is not None
    assert there > 0
