"""What a run shows to trackers."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

from PIL import Image

from bilora_diffusion.train import loop


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
