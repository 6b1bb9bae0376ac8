"""eval.generalization: gaps, paired differences and equal training loss against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bilora_diffusion.errors import UserError
from eval.curves import generalization_plot, generalization_report, groups
from eval.curves.generalization_result import GeneralizationResult, compare
from eval.records import GENERALIZATION
from eval.statistics import bootstrap_interval
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


@pytest.fixture
def result(tmp_path: Path) -> GeneralizationResult:
    return comparison(tmp_path)


def comparison(folder: Path) -> GeneralizationResult:
    runs = [
        recorded_runs.make(folder / f"{m}{s}", m, s, steps=STEPS[1:], losses=losses(m, s))
        for m in ("bilora", "lora")
        for s in range(4)
    ]
    return compare(groups.gather([str(run) for run in runs], []), None, "python -m x")


def test_losses_gap_and_differences(result: GeneralizationResult) -> None:
    assert result.control == "LoRA"
    for group in result.groups:
        own = [losses(group.method, seed) for seed in range(4)]
        for i, step in enumerate(STEPS):
            training, heldout = (np.array([o[step][k] for o in own]) for k in (0, 1))
            for found, values in (
                (group.training, training),
                (group.heldout, heldout),
                (group.gap, heldout - training),
            ):
                assert found.steps[i] == step
                assert found.mean[i] == pytest.approx(values.mean())
                error = values.std(ddof=1) / 2
                assert found.error[i] == pytest.approx(error, abs=1e-15)
    bilora, lora = result.groups
    assert lora.final_gap.difference is None
    assert lora.differences == {"training": [], "heldout": [], "gap": []}
    changes = [losses("bilora", s)[30][1] - losses("lora", s)[30][1] for s in range(4)]
    difference = bilora.final_gap.difference
    assert difference is not None
    assert difference.mean == pytest.approx(np.mean(changes))
    interval = bootstrap_interval(changes)
    assert difference.interval is not None
    assert interval is not None
    assert difference.interval.low == pytest.approx(interval.low)
    assert difference.better == 4
    assert [d.step for d in bilora.differences["gap"]] == list(STEPS)
    assert bilora.differences["gap"][-1].paired == difference
    assert bilora.lowest_heldout.mean == pytest.approx(
        np.mean([min(v for _, v in losses("bilora", s).values()) for s in range(4)])
    )


def test_equal_training_loss(result: GeneralizationResult) -> None:
    assert result.equal_training is not None
    assert result.equal_training.training_loss == pytest.approx(0.07)
    bilora = result.groups[0]
    assert bilora.equal_training.mean == pytest.approx(
        np.mean([losses("bilora", s)[30][1] for s in range(4)])
    )


def test_the_claims_follow_the_data(result: GeneralizationResult) -> None:
    assert [claim.verdict for claim in result.claims] == ["agrees"] * 3
    lines = generalization_report.to_markdown(result).splitlines()
    said = [line for line in lines if "Fig. A3" in line]
    assert len(said) == 3
    assert "of the control's, lower in 4 of 4 seeds" in said[1]


def test_a_worse_bilora_is_said_to_be_worse(tmp_path: Path) -> None:
    runs = [
        recorded_runs.make(
            tmp_path / f"{m}{s}",
            m,
            s,
            steps=STEPS[1:],
            # the names of the methods are swapped
            losses=losses("lora" if m == "bilora" else "bilora", s),
        )
        for m in ("bilora", "lora")
        for s in range(4)
    ]
    result = compare(groups.gather([str(run) for run in runs], []), None, "python -m x")
    assert [claim.verdict for claim in result.claims] == ["agrees", "disagrees", "disagrees"]
    assert "These runs disagree" in generalization_report.to_markdown(result)


def test_runs_of_other_data_are_not_paired(tmp_path: Path) -> None:
    runs = [
        recorded_runs.make(tmp_path / m, m, 0, steps=STEPS[1:], losses=losses(m, 0))
        for m in ("bilora", "lora")
    ]
    file = runs[0] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"digest": "0-', '"digest": "other-'))
    result = compare(groups.gather([str(run) for run in runs], []), None, "python -m x")
    assert result.groups[0].paired is False
    assert result.groups[0].final_heldout.difference is None
    assert [claim.verdict for claim in result.claims] == ["unclear"] * 3
    assert any("saw other data or noise" in note for note in result.notes)


def test_notes_speak_of_what_was_trained_on(result: GeneralizationResult, tmp_path: Path) -> None:
    assert "held-out images" in result.notes[0]
    text = recorded_runs.make(
        tmp_path / "text",
        "lora",
        steps=STEPS[1:],
        losses=losses("lora", 0),
        config={"model_name_or_path": "smollm2"},
    )
    found = compare(groups.gather([str(text)], []), None, "x")
    assert "held-out rows" in found.notes[0]
    assert "noise" not in found.notes[0]


def test_the_json_is_strict_and_the_figure_is_drawn(
    result: GeneralizationResult, tmp_path: Path
) -> None:
    record = json.loads(GENERALIZATION.text(result), parse_constant=pytest.fail)
    assert (record["kind"], record["schema_version"]) == ("generalization", 1)
    assert record["runs"] == ["Bi-LoRA", "LoRA"]
    assert generalization_plot.draw(result, tmp_path) == ["generalization.png"]
    assert (tmp_path / "generalization.png").stat().st_size > 10_000


def test_runs_without_curves_and_unknown_controls_are_refused(tmp_path: Path) -> None:
    bare = recorded_runs.make(tmp_path / "bare", "lora", steps=(1, 2))
    with pytest.raises(UserError, match="0 measurements of heldout_loss"):
        compare(groups.gather([str(bare)], []), None, "x")
    with pytest.raises(UserError, match='--control is "lora"'):
        compare(groups.gather([str(bare)], []), "lora", "x")
    apart = [
        recorded_runs.make(tmp_path / str(s), "lora", s, steps=(), losses=own)
        for s, own in enumerate(({0: (1, 1), 2: (0.9, 1)}, {1: (1, 1), 3: (0.9, 1)}))
    ]
    with pytest.raises(UserError, match="no recorded step in common"):
        compare(groups.gather([str(run) for run in apart], []), None, "x")
