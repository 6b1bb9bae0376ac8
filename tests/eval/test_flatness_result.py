"""Groups, the JSON, the report, the pictures and the store, on a made-up result."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from eval.flatness import plot, report
from eval.flatness.groups import summarize
from eval.flatness.profile import coordinates
from eval.flatness.result import LandscapeResult, RunResult, Settings, SpaceResult
from eval.flatness.store import Store
from eval.provenance import of_runs
from eval.records import LANDSCAPE

POSITIONS = coordinates(1.0, 5)


def entry(group: str, seed: int, curvature: float) -> RunResult:
    """A run whose loss is 1 + curvature t^2, in two directions of which one is twice as steep."""
    profiles = [[1 + k * curvature * t**2 for t in POSITIONS] for k in (1, 2)]
    grid = [[1 + curvature * (s**2 + 2 * t**2) for t in POSITIONS] for s in POSITIONS]
    own = SpaceResult(
        parameters=1000,
        profiles=profiles,  # pyright: ignore[reportArgumentType]
        rise=1.5 * curvature,
        sharpness=curvature,
        one_step=curvature / 2,
        gradient_norm=0.1,
        grid=grid if seed == 0 else None,  # pyright: ignore[reportArgumentType]
        eigenvalue=2 * curvature,
        eigenvalue_residual=1e-6,
    )
    both = {"lora": own, "full": replace(own, parameters=10**7)}
    return RunResult(
        f"{group} seed {seed}", group, "adapter", group.lower(), seed, f"run-{seed}", "d", 1.0, both
    )


@pytest.fixture
def result() -> LandscapeResult:
    entries = [entry("LoRA", seed, 0.4 + 0.01 * seed) for seed in range(3)]
    entries += [entry("Bi-LoRA", seed, 0.3 + 0.01 * seed) for seed in range(3)]
    settings = Settings(
        spaces=["lora", "full"],
        full_weights="all",
        directions=2,
        positions={"lora": POSITIONS, "full": POSITIONS},
        grid_positions={"lora": POSITIONS, "full": POSITIONS},
        rho=0.05,
        ascent_steps=10,
        restarts=0,
        eigenvalue=True,
        split="train",
        images=8,
        levels=4,
        seed=0,
    )
    runs = [one.label for one in entries]
    return LandscapeResult(runs, settings, "LoRA", summarize(entries, "LoRA"), entries, [], {})


def test_groups_are_means_over_runs_and_differences_over_seeds(result: LandscapeResult) -> None:
    lora, bilora = result.groups
    own = lora.spaces["lora"]
    assert own.profile[0] == pytest.approx(1 + 1.5 * 0.41)
    assert own.profile[2] == 1
    # Standard error over the means of three runs, 1.5 * (0.40, 0.41, 0.42).
    assert own.band[0] == pytest.approx(1.5 * 0.01 / 3**0.5)
    assert own.sharpness.mean == pytest.approx(0.41)
    assert own.sharpness.difference is None
    difference = bilora.spaces["lora"].sharpness.difference
    assert difference is not None
    assert difference.mean == pytest.approx(-0.1)
    assert (difference.better, difference.seeds) == (3, 3)
    assert own.difference is None
    below = bilora.spaces["lora"].difference
    assert below is not None
    assert below == pytest.approx([-0.15 * t**2 for t in POSITIONS])  # 1.5 times -0.1
    assert bilora.spaces["lora"].difference_band == pytest.approx([0] * 5, abs=1e-12)


def test_the_band_of_one_run_is_over_its_directions(result: LandscapeResult) -> None:
    (alone,) = summarize(result.entries[:1], "LoRA")
    values = [1 + 0.4, 1 + 0.8]
    assert alone.spaces["lora"].band[0] == pytest.approx(np.std(values, ddof=1) / 2**0.5)
    assert alone.spaces["lora"].sharpness.interval is None


def test_a_loss_that_is_not_finite_is_left_open(result: LandscapeResult, tmp_path: Path) -> None:
    first = result.entries[0]
    own = first.spaces["lora"]
    profiles = [[None, *own.profiles[0][1:]], own.profiles[1]]
    broken = replace(own, profiles=profiles, rise=None, eigenvalue=None)
    entries = [replace(first, spaces=first.spaces | {"lora": broken}), *result.entries[1:]]
    groups = summarize(entries, "LoRA")
    assert groups[0].spaces["lora"].profile[0] is None
    assert groups[0].spaces["lora"].profile[1] is not None
    difference = groups[1].spaces["lora"].rise.difference
    assert difference is not None
    assert difference.seeds == 2
    found = replace(result, entries=entries, groups=groups)
    assert plot.draw(found, tmp_path) == ["landscape.png", "landscape_grid.png"]


def test_what_is_written_is_read_back(result: LandscapeResult, tmp_path: Path) -> None:
    found = replace(result, figures=["landscape.png"], provenance={"command": "x"})
    LANDSCAPE.write(found, tmp_path)
    assert LANDSCAPE.read(LandscapeResult, tmp_path) == found


def test_damaged_results_are_refused_in_one_sentence(
    result: LandscapeResult, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no landscape"):
        LANDSCAPE.read(LandscapeResult, tmp_path)
    LANDSCAPE.write(result, tmp_path)
    file = tmp_path / "landscape.json"
    record = json.loads(file.read_text())
    for change, said in (
        ({"schema_version": 2}, "schema version 2"),
        ({"kind": "dynamics"}, "'dynamics'"),
        ({"groups": [{"label": "x"}]}, "damaged"),
    ):
        file.write_text(json.dumps(record | change))
        with pytest.raises(UserError, match=said):
            LANDSCAPE.read(LandscapeResult, tmp_path)
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        LANDSCAPE.read(LandscapeResult, tmp_path)


def test_the_report_has_a_row_per_group_and_space(result: LandscapeResult) -> None:
    run = {"versions": {"torch": "2"}, "device": {"name": "a processor"}}
    text = report.to_markdown(result, of_runs("python -m eval.landscape a", [run]))
    rows = [line for line in text.splitlines() if line.startswith(("| LoRA", "| Bi-LoRA"))]
    assert len(rows) == 4
    assert rows[0].startswith("| LoRA (control) | 3 | 1 [1, 1] | 0.615 [")
    assert "-0.1 [-0.1, -0.1], 3/3" in rows[1]
    assert "10,000,000 numbers" in text
    assert "`python -m eval.landscape a`" in text


def test_the_pictures_are_drawn(result: LandscapeResult, tmp_path: Path) -> None:
    for name in plot.draw(result, tmp_path):
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape[0] > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    flat = [
        replace(e, spaces={n: replace(s, grid=None) for n, s in e.spaces.items()})
        for e in result.entries
    ]
    assert plot.draw(replace(result, entries=flat), tmp_path) == ["landscape.png"]


def test_the_store_keeps_parts_by_what_they_depend_on(tmp_path: Path) -> None:
    store = Store(tmp_path, ["weights", 1])
    assert store.get(["line", 0]) is None
    assert store.put(["line", 0], [1.5, float("nan")]) == [1.5, None]
    again = Store(tmp_path, ["weights", 1])
    assert again.get(["line", 0]) == [1.5, None]
    assert again.get(["line", 1]) is None
    assert Store(tmp_path, ["weights", 2]).get(["line", 0]) is None
    (file,) = (tmp_path / "measured").iterdir()
    file.write_text(file.read_text()[:20])
    assert Store(tmp_path, ["weights", 1]).get(["line", 0]) is None


def test_json_has_only_plain_values(result: LandscapeResult) -> None:
    assert json.loads(json.dumps(asdict(result)))["control"] == "LoRA"
