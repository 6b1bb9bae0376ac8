"""What a run shows at the terminal and to trackers."""

import logging
import sys
from types import SimpleNamespace
from unittest.mock import Mock

from PIL import Image

from bilora_diffusion.mini import scorer
from bilora_diffusion.train import command, loop


def test_of_the_libraries_only_warnings_are_shown(monkeypatch, capsys):
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])  # those of pytest
    try:
        command.show_messages()
        scorer.load()  # open_clip logs ten lines
        logging.getLogger("library").warning("a warning")
        logging.getLogger(command.__name__).info("a note")
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err == "a warning\na note\n"


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
