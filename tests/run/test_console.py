"""What a run says: the bar smooths the loss, the last block names the best step and real paths."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from bilora_diffusion.run import console, trackers


def rows(**losses: float) -> list[dict[str, Any]]:
    return [{"step": int(step[1:]), "heldout_loss": loss} for step, loss in losses.items()]


def test_the_bar_says_what_it_waits_for_and_smooths_the_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[str] = []
    with console.Bar(4, 0, "bilora", told.append) as bar:
        bar.step({"loss": 1.0, "lr": 1e-3})
        bar.step({"loss": 3.0, "lr": 1e-3, "auxiliary_norm": 0.05})
        with bar.waiting_for("held-out loss"):
            assert told == ["held-out loss"]
    assert told == ["held-out loss", "training"]
    shown = capsys.readouterr().err
    mean = (0.95 * 1 + 3) / 1.95
    assert f"loss={mean:.4f}" in shown
    assert "bilora: held-out loss" in shown


def test_processes_without_a_record_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Bar(1, 0, "lora", None) as bar, bar.waiting_for("validation"):
        bar.step({"loss": 1.0, "lr": 1e-3})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("kept", "command"), [((100, 150), True), ((150, 200), False)], ids=["kept", "pruned"]
)
def test_the_end_names_the_best_step_and_how_to_get_its_adapter(
    tmp_path: Path, kept: tuple[int, ...], command: bool
) -> None:
    run = tmp_path / "my run"
    for step in kept:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (run / "weights.safetensors").touch()
    files = {"for diffusers": "weights.safetensors", "model card": "README.md"}
    course = rows(s0=0.12, s100=0.0795, s200=0.0836)
    text = console.closing(run, files, course, 192, "eval.clip_scores")
    assert "done in 3 min 12 s" in text
    assert str(run / "weights.safetensors") in text
    assert "model card" not in text  # it is not there
    assert "0.1200 at step 0, 0.0836 at step 200, lowest 0.0795 at step 100" in text
    assert (f"python -m bilora_diffusion.export '{run}' --step 100" in text) is command
    assert f"python -m eval.clip_scores '{run}' base" in text


def test_a_loss_that_was_not_finite_is_no_lowest(tmp_path: Path) -> None:
    course = [*rows(s0=0.2, s2=0.1), {"step": 4, "heldout_loss": None, "nonfinite": True}]
    text = console.closing(tmp_path, {}, course, 1, "eval.text_scores")
    assert "0.1000 at step 2, the lowest measured" in text


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases, of which only what makes an image is called."""
    module = SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(sys.modules, "wandb", module)  # a stand-in: its service is not here


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_each_image_with_its_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "validation" / "step-7"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (4, 4)).save(folder / f"{number:03d}.png")
    logged: list[Any] = []
    tracker = SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step)))
    trainer: Any = SimpleNamespace(
        step=7,
        cfg=SimpleNamespace(sampled_prompts=["a frog", "a sun"]),
        accelerator=SimpleNamespace(trackers=[tracker]),
    )
    trackers.log_images(trainer, tmp_path)
    assert logged == [({"validation": [((4, 4), "a frog"), ((4, 4), "a sun")]}, 7)]
