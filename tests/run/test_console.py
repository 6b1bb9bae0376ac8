"""What a run says: the bar smooths the loss, the last block names the best step and real paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilora_diffusion.run import console
from bilora_diffusion.run.durations import duration
from bilora_diffusion.run.runlog import RunLog


def measured(
    folder: Path, losses: dict[int, float], config: dict[str, int | None] | None = None
) -> None:
    """The record of a run with these held-out losses by step."""
    log = RunLog(folder)
    log.start(config or {}, method="lora", seed=0, resume_step=None)
    for step, loss in losses.items():
        log.metric(step, heldout_loss=loss)
    log.finish()


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
    # processes without a record show nothing
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


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        ({"validation_dataset": None, "folds": None}, "--validation_dataset"),
        ({"validation_file": None, "folds": None}, "--validation_file"),
        ({"validation_dataset": None, "folds": 2}, ""),
    ],
)
def test_the_last_line_names_what_shows_overfitting_where_nothing_was_held_out(
    config: dict[str, int | None], flag: str, tmp_path: Path
) -> None:
    def last_line() -> str:
        return console.closing(tmp_path, {}, "eval.clip_scores").splitlines()[-1]

    measured(tmp_path, {}, config)
    assert ("--folds" in last_line()) is bool(flag)
    assert flag in last_line()
    measured(tmp_path, {2: 0.1}, config)
    assert "score it" in last_line()


def test_durations_are_said_as_a_person_says_them() -> None:
    said = {47.6: "48 s", 192: "3 min 12 s", 7500: "2 h 5 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
