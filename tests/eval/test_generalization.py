"""eval.generalization: gaps, paired differences and equal training loss against plain loops."""

from pathlib import Path

import numpy as np
import pytest

from eval import generalization, table
from eval.compare import bootstrap_interval
from eval.generalization import GAP, HELDOUT, TRAINING
from eval.table import Result
from tests.run import recorded_runs

STEPS = (0, 10, 20, 30)
Losses = dict[int, tuple[float, float]]


def losses(method: str, seed: int) -> Losses:
    """Training loss falls; held-out loss falls and rises, less so for Bi-LoRA."""
    rise = 0.002 if method == "lora" else 0.0015 + 1e-4 * seed
    return {
        step: (0.1 - 0.001 * step, 0.1 - 0.0005 * step + rise * (i == 3) + 1e-3 * seed)
        for i, step in enumerate(STEPS)
    }


def make(folder: Path, method: str, seed: int) -> str:
    own = losses(method, seed)
    return str(recorded_runs.make(folder / f"{method}{seed}", method, seed, STEPS[1:], losses=own))


def measure(folder: Path, runs: list[str]) -> Result:
    assert generalization.main([*runs, "--output_dir", str(folder / "out")]) == 0
    return table.read(folder / "out")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("runs")
    return measure(folder, [make(folder, m, s) for m in ("bilora", "lora") for s in range(4)])


def test_losses_gap_and_differences(result):
    assert (result.groups, result.control) == (["Bi-LoRA", "LoRA"], "LoRA")
    for group, method in (("Bi-LoRA", "bilora"), ("LoRA", "lora")):
        own = [losses(method, seed) for seed in range(4)]
        training, heldout = (np.array([[o[s][k] for s in STEPS] for o in own]) for k in (0, 1))
        for name, values in ((TRAINING, training), (HELDOUT, heldout), (GAP, heldout - training)):
            curve = result.curve(group, name)
            assert [point.step for point in curve] == list(STEPS)
            assert [point.mean for point in curve] == pytest.approx(values.mean(0))
            errors = values.std(0, ddof=1) / 2
            assert [point.error for point in curve] == pytest.approx(errors, abs=1e-15)
    changes = [losses("bilora", s)[30][1] - losses("lora", s)[30][1] for s in range(4)]
    final, at_step = (
        result.summary("Bi-LoRA", name, step=step)
        for name, step in ((f"final {GAP}", None), (GAP, 30))
    )
    assert final is not None
    assert at_step is not None
    assert final.difference == at_step.difference == pytest.approx(np.mean(changes))
    assert final.difference_interval == pytest.approx(bootstrap_interval(changes))
    assert final.lower == 4
    lowest = [min(value for _, value in losses("bilora", s).values()) for s in range(4)]
    at_the_end = [losses("bilora", s)[30][1] for s in range(4)]
    for name, values in (("best", lowest), ("equal_training", at_the_end)):
        line = result.summary("Bi-LoRA", f"{name} {HELDOUT}")
        assert line is not None
        assert line.mean == pytest.approx(np.mean(values))
    assert result.settings["equal_training"]["training_loss"] == pytest.approx(0.07)


def test_runs_of_other_data_are_not_paired_and_notes_say_what_was_trained_on(result, tmp_path):
    assert "held-out images" in result.notes[0]
    own, config = losses("lora", 0), {"model_name_or_path": "smollm2"}
    text = recorded_runs.make(tmp_path / "text", "lora", 0, STEPS[1:], config, losses=own)
    (note, *_) = measure(tmp_path, [str(text)]).notes
    assert "held-out rows" in note
    assert "noise" not in note
    runs = [make(tmp_path, method, 0) for method in ("bilora", "lora")]
    file = Path(runs[0]) / "metrics.jsonl"
    file.write_text(file.read_text().replace('"digest": "0-', '"digest": "other-'))
    result = measure(tmp_path, runs)
    assert all(line.difference is None for line in result.summaries)
    assert any("saw other data or noise" in note for note in result.notes)
    assert "not paired" in (tmp_path / "out" / "report.md").read_text()
