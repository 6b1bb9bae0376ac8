"""A run's messages in the terminal, and the images that it sends to trackers."""

import logging
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from PIL import Image

from bilora_diffusion.mini import scorer
from bilora_diffusion.run.record import validation_folder
from bilora_diffusion.train import command, loop


def test_only_warnings_of_libraries_are_shown(monkeypatch, capsys):
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])  # removes pytest's handlers
    try:
        command.show_messages()
        scorer.load()  # open_clip logs ten lines
        logging.getLogger("library").warning("a warning")
        logging.getLogger(command.__name__).info("a note")
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err == "a warning\na note\n"


def test_wandb_gets_each_image_with_its_prompt(tmp_path, monkeypatch):
    # A stand-in for wandb with its image class, since tests cannot reach its service.
    module = SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(sys.modules, "wandb", module)
    files = [tmp_path / "000.png", tmp_path / "001.png"]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    log = Mock()
    loop.show_images([SimpleNamespace(name="wandb", log=log)], files, ["a frog", "a sun"], step=0)
    log.assert_called_once_with({"validation": [((4, 4), "a frog"), ((4, 4), "a sun")]}, step=0)


def test_trackers_get_only_the_images_of_this_run(tmp_path, monkeypatch):
    """The folder may have images of an earlier run; files are sorted by number, not by name."""
    show_images = Mock()
    monkeypatch.setattr(loop, "show_images", show_images)
    prompts = ["a frog"] * 1001
    trainer: Any = SimpleNamespace(
        step=3,
        is_finished=False,
        evaluating=lambda final_weights: None,
        task=SimpleNamespace(validate=lambda step, folder, evaluating: {}),
        cfg=SimpleNamespace(sampled_prompts=prompts),
        accelerator=SimpleNamespace(is_fsdp2=False, trackers=[]),
    )
    folder = validation_folder(tmp_path, 3)
    folder.mkdir(parents=True)
    (folder / "1001.png").touch()  # left by a run with more images
    log: Any = Mock()
    loop.Evaluations(trainer, tmp_path, log, Mock())._make_samples()
    _, files, shown_prompts, _ = show_images.call_args.args
    assert [file.name for file in files[-2:]] == ["999.png", "1000.png"]
    assert len(files) == len(shown_prompts) == 1001
