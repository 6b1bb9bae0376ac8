"""What a run says: the bar smooths the loss, the last block names the best step and real paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilora_diffusion.run import console
from bilora_diffusion.run.runlog import RunLog


def measured(
    folder: Path, losses: dict[int, float], config: dict[str, int | None] | None = None
) -> None:
    """The record of a run with these held-out losses by step."""
    log = RunLog(folder)
    log.start(config or {}, method="lora", seed=0, resume_step=None)
    for step, loss in losses.items():
        log.metric(step, heldout_loss=loss)
    log.close("finished")


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
    measured(run, {0: 0.12, 100: 0.0795, 200: 0.0836})
    text = console.closing(run, files, "eval.clip_scores")
    assert str(run / "weights.safetensors") in text
    assert "model card" not in text  # it is not there
    assert "0.1200 at step 0, 0.0836 at step 200, lowest 0.0795 at step 100" in text
    assert (f"python -m bilora_diffusion.export '{run}' --step 100" in text) is command
    assert f"python -m eval.clip_scores '{run}' base" in text
    measured(tmp_path / "other", {0: 0.2, 2: 0.1, 4: float("nan")})
    text = console.closing(tmp_path / "other", {}, "eval.text_scores")
    assert "0.1000 at step 2, the lowest measured" in text
