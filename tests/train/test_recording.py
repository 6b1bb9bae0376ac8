"""What a run says before it (how much it will write) and to the trackers."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.train import recording

MB = 10**6


def trainer(**options) -> Any:
    """8 images, 4 a step, 1000 steps, 1 MB of trained weights."""
    cfg = {
        **{"optimizer": "adamw", "checkpointing_steps": 100},
        **{"checkpoints_total_limit": 2, "sampled_prompts": [], "mixed_precision": "no"},
        **{"resolution": 1000, "keep_best": False, **options},
    }
    weights = {"w": torch.zeros(1, device="meta").expand(250_000)}
    method = SimpleNamespace(
        tensors=lambda: weights, clip_parameters=list, title="LoRA", exports_weights=True
    )
    return SimpleNamespace(
        cfg=SimpleNamespace(**cfg),
        method=method,
        accelerator=SimpleNamespace(device="cpu", num_processes=1),
        dynamics=None,
        step=0,
        last_step=1000,
        validation_steps=50,
        task=SimpleNamespace(num_samples=8, data_summary=lambda: "8 images"),
        schedule=SimpleNamespace(step_size=4),
    )


@pytest.mark.parametrize(
    ("steps", "said"), [(1, "1 step of 4 (0.5 epochs)"), (2, "2 steps of 4 (1 epoch)")]
)
def test_a_count_of_one_is_singular(steps, said, tmp_path, caplog):
    caplog.set_level("INFO")
    run = trainer()
    run.last_step = steps
    recording.announce(run, tmp_path)
    assert said in caplog.text


def test_wandb_gets_each_image_with_its_prompt(tmp_path, monkeypatch):
    # a stand-in of which only what makes an image is called: its service is not here
    module = SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = tmp_path / "validation" / "step-0"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (4, 4)).save(folder / f"{number:03d}.png")
    logged: list[Any] = []
    tracker = SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step)))
    run = trainer(sampled_prompts=["a frog", "a sun"])
    run.accelerator.trackers = [tracker]
    recording.show_images(run, tmp_path, 0)
    assert logged == [({"validation": [((4, 4), "a frog"), ((4, 4), "a sun")]}, 0)]
