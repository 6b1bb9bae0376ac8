"""What a run says before it, and what it shows to trackers."""

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image

from bilora_diffusion.train import loop, setup


@pytest.mark.parametrize(
    ("steps", "sentence"), [(1, "1 step of 4 (0.5 epochs)"), (2, "2 steps of 4 (1 epoch)")]
)
def test_a_count_of_one_is_singular(steps, sentence, tmp_path, caplog):
    caplog.set_level("INFO")
    run: Any = SimpleNamespace(
        cfg=SimpleNamespace(mixed_precision="no", rank=4, config="sdxl"),
        method=SimpleNamespace(result_parameters=list, title="LoRA", exports_weights=True),
        accelerator=SimpleNamespace(device="cpu", num_processes=1),
        step=0,
        last_step=steps,
        task=SimpleNamespace(num_samples=8, data_summary=lambda: "8 images"),
        layout=SimpleNamespace(step_size=4),
    )
    setup.announce(run, tmp_path)
    assert sentence in caplog.text
    assert "; recipe sdxl; into" in caplog.text


def test_wandb_gets_each_image_with_its_prompt(tmp_path, monkeypatch):
    # A stand-in with the class of its images; Weights & Biases' service is out of reach.
    module = SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(sys.modules, "wandb", module)
    files = [tmp_path / "000.png", tmp_path / "001.png"]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    log = Mock()
    loop.show_images([SimpleNamespace(name="wandb", log=log)], files, ["a frog", "a sun"], step=0)
    log.assert_called_once_with({"validation": [((4, 4), "a frog"), ((4, 4), "a sun")]}, step=0)
