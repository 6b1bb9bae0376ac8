"""eval.dynamics and eval.generalization against plain computations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import snapshots
from eval import dynamics, generalization, table
from eval import dynamics_curves as curves
from eval.dynamics_curves import settles
from eval.generalization import GAP, HELDOUT_LOSS, TRAINING_GRID_LOSS
from eval.sources import run as opened
from tests.run import recorded_runs

COSINES = st.lists(st.floats(-1, 1) | st.none(), max_size=12)


@given(COSINES)
def test_settling_is_the_start_of_the_last_stretch_above(values):
    settled_step = settles(range(0, 2 * len(values), 2), values, 0.5)
    points = [(2 * i, v) for i, v in enumerate(values) if v is not None]
    stays = [step for i, (step, _) in enumerate(points) if all(v >= 0.5 for _, v in points[i:])]
    if not stays:
        assert settled_step is None
    else:
        earlier = [step for step, _ in points if step < stays[0]]
        assert (earlier[-1] if earlier else stays[0]) <= (settled_step or 0) <= stays[0]
    # in between, on the straight line
    assert settles([0, 10, 20, 30], [0.95, 0.5, 0.7, 1.0], 0.9) == pytest.approx(20 + 10 * 2 / 3)


def test_cosines_are_those_of_the_whole_matrices():
    generator = torch.Generator().manual_seed(0)
    left, right = recorded_runs.factors(generator), recorded_runs.factors(generator)
    cosines = curves.cosines(left, right)

    def naive(*sides):
        a, b = (np.concatenate([x.double().numpy().ravel() for x in side]) for side in sides)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    parts = {
        "A": [[f.A for f in side] for side in (left, right)],
        "B": [[f.B for f in side] for side in (left, right)],
        "factors": [[x for f in side for x in (f.A, f.B)] for side in (left, right)],
        "product": [[f.B.double() @ f.A.double() for f in side] for side in (left, right)],
    }
    for name, sides in parts.items():
        assert cosines[name] == pytest.approx(naive(*sides), abs=1e-12)
    wider = curves.cosines(left, recorded_runs.factors(generator, rank=3))
    assert [wider[name] is None for name in curves.QUANTITIES] == [True, True, True, False]
    zero = [f._replace(B=torch.zeros_like(f.B)) for f in left]
    assert curves.cosines(zero, left)["product"] is None


def test_curves_over_one_layer_and_over_all(tmp_path):
    run = recorded_runs.make(tmp_path / "run")
    layer = "unet.up.to_out"
    run_curves = curves.read(opened(run, "run"), [layer])
    files = snapshots.steps(run)
    last, middle = snapshots.read(files[10]), snapshots.read(files[4])
    for name, where in ((curves.ALL_LAYERS, [0, 1, 2]), (layer, [2])):
        values = run_curves[name].values
        assert values["primary/product"][10] == pytest.approx(1)
        for role, adapter, final_adapter in (
            ("primary", PRIMARY, PRIMARY),
            ("auxiliary", AUXILIARY, AUXILIARY),
            (curves.CROSS, AUXILIARY, PRIMARY),
        ):
            factors = [middle.factors[adapter][i] for i in where]
            final_factors = [last.factors[final_adapter][i] for i in where]
            for quantity, value in curves.cosines(factors, final_factors).items():
                assert values[f"{role}/{quantity}"][4] == value
        assert values["auxiliary_norm"][3] == 0.05
    names = [f"layer.{i}" for i in range(10)]
    with pytest.raises(UserError, match="lacks layer"):
        curves.read(opened(run, "run"), ["layer.3"])
    assert curves.spread(names, 4) == ["layer.0", "layer.3", "layer.6", "layer.9"]
    assert curves.spread(names[:2], 4) == names[:2]
    assert run_curves[layer].chance == {"column_overlap": 2 / 4, "row_overlap": 2 / 7}
    assert run_curves[curves.ALL_LAYERS].chance["column_overlap"] == pytest.approx(
        (2 / 6 + 2 / 6 + 2 / 4) / 3
    )


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """Three seeds of Bi-LoRA, whose auxiliary moves at the end only, and two of LoRA-SAM."""
    folder = tmp_path_factory.mktemp("late")
    course = {AUXILIARY: lambda step: (step / 10) ** 20 * (1 if step == 10 else 0.1)}
    runs = [recorded_runs.make(folder / f"b{s}", "bilora", s, course=course) for s in range(3)]
    ratio = (100.0, 2e4, 3e4)
    runs += [recorded_runs.make(folder / f"sam{s}", "lora-sam", s, ratio=ratio) for s in range(2)]
    assert dynamics.main([*map(str, runs), "--output_dir", str(folder / "out")]) == 0
    return folder, table.read(folder / "out")


def test_key_figures_are_those_of_the_curves_and_files_are_whole(late):
    folder, result = late
    for who in ("primary", "auxiliary"):
        settled = {}
        for row in result.select(f"settled {who}/product"):
            all_layers = curves.read(opened(folder / row.subject, ""))[curves.ALL_LAYERS]
            steps, cosines = zip(*all_layers.values[f"{who}/product"].items(), strict=True)
            settled[row.seed] = row.value
            assert row.value == settles(steps, cosines, 0.9)
        line = result.summary("Bi-LoRA", f"settled {who}/product")
        assert line.mean == pytest.approx(np.mean([*settled.values()]))
    curve = result.curve("Bi-LoRA", "auxiliary/product")
    rows = result.select("auxiliary/product", "Bi-LoRA")
    values = np.array([row.value for row in rows], dtype=float).reshape(3, 11)  # runs of steps
    assert [point.mean for point in curve] == pytest.approx(values.mean(0))
    lag = result.summary("Bi-LoRA", "lag product")
    layers_above = result.summary("LoRA-SAM", "layers_above")
    assert lag.low > 0  # the auxiliary settles later
    assert layers_above.mean == pytest.approx(2 / 3)
    assert {row.item for row in result.rows if row.item} == set(recorded_runs.SHAPES)

    names = ["fig2_lora_sam.png", "figA4_layers.png", "figA2_convergence.png", "auxiliary.png"]
    assert result.figures == names
    out = folder / "out"
    assert all((out / name).stat().st_size > 10_000 for name in names)
    tables = [table.FILE, table.REPORT, table.ROWS, table.SUMMARY]
    assert {path.name for path in out.iterdir()} == {*names, *tables}
    assert not any(str(folder) in (out / name).read_text() for name in tables)


STEPS = (0, 10, 20, 30)


def losses(method, seed):
    """Training loss falls; held-out loss falls and rises, less so for Bi-LoRA."""
    rise = 0.002 if method == "lora" else 0.0015 + 1e-4 * seed
    return {
        step: (0.1 - 0.001 * step, 0.1 - 0.0005 * step + rise * (i == 3) + 1e-3 * seed)
        for i, step in enumerate(STEPS)
    }


def make(folder, method, seed):
    run = folder / f"{method}{seed}"
    return str(recorded_runs.make(run, method, seed, STEPS[1:], losses=losses(method, seed)))


def measure(folder, runs):
    assert generalization.main([*runs, "--output_dir", str(folder / "out")]) == 0
    return table.read(folder / "out")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return measure(folder, [make(folder, m, s) for m in ("bilora", "lora") for s in range(4)])


def test_losses_gap_and_differences(result):
    assert (result.groups, result.control) == (["Bi-LoRA", "LoRA"], "LoRA")
    for group, method in (("Bi-LoRA", "bilora"), ("LoRA", "lora")):
        seed_losses = [losses(method, seed) for seed in range(4)]
        values = np.array([[by_step[step] for step in STEPS] for by_step in seed_losses])
        training, heldout = values[..., 0], values[..., 1]  # (seeds, steps)
        for name, values in (
            (TRAINING_GRID_LOSS, training),
            (HELDOUT_LOSS, heldout),
            (GAP, heldout - training),
        ):
            curve = result.curve(group, name)
            assert [point.step for point in curve] == list(STEPS)
            assert [point.mean for point in curve] == pytest.approx(values.mean(0))
    changes = [losses("bilora", s)[30][1] - losses("lora", s)[30][1] for s in range(4)]
    final = result.summary("Bi-LoRA", f"final {GAP}")
    assert (final.difference, final.lower) == (pytest.approx(np.mean(changes)), 4)
    lowest = [min(value for _, value in losses("bilora", s).values()) for s in range(4)]
    at_the_end = [losses("bilora", s)[30][1] for s in range(4)]
    for name, values in (("best", lowest), ("equal_training", at_the_end)):
        line = result.summary("Bi-LoRA", f"{name} {HELDOUT_LOSS}")
        assert line.mean == pytest.approx(np.mean(values))
    assert result.settings["equal_training"]["training_loss"] == pytest.approx(0.07)


def test_runs_of_other_data_are_not_paired_and_notes_say_what_was_trained_on(result, tmp_path):
    assert "held-out images" in result.notes[0]
    run_losses, config = losses("lora", 0), {"model_name_or_path": "smollm2"}
    text = recorded_runs.make(tmp_path / "text", "lora", 0, STEPS[1:], config, losses=run_losses)
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


def test_the_loss_by_noise_level_is_that_of_the_last_step(tmp_path):
    runs = []
    for method, at_level_125 in (("lora", 0.2), ("bilora", 0.15)):
        run = Path(make(tmp_path, method, 0))
        log = run / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            # Only the last step's value may show.
            is_last = line["step"] == STEPS[-1]
            line["heldout_loss_by_level/125"] = at_level_125 if is_last else 9.0
            line["heldout_loss_by_level/25"] = 0.5
        log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        runs.append(str(run))
    measure(tmp_path, runs)
    report = (tmp_path / "out" / table.REPORT).read_text()
    assert "| noise level | LoRA | Bi-LoRA minus LoRA |" in report
    # Times 1000; levels in the order of their numbers.
    assert report.index("| 25 | 500.00 |") < report.index("| 125 | 200.00 | -50.00 [n/a], 1/1 |")
