"""eval.dynamics and eval.generalization, compared with plain computations."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import snapshots
from eval import dynamics, generalization
from eval.dynamics import curves
from eval.dynamics.curves import settles
from eval.generalization import GAP, HELDOUT_LOSS, TRAINING_GRID_LOSS
from eval.results import table
from eval.sources import open_run
from tests.eval.commands import result_of
from tests.run import recorded_runs

COSINES = st.lists(st.floats(-1, 1) | st.none(), max_size=12)


@given(COSINES)
def test_the_settling_step_is_the_start_of_the_last_stretch_above_the_level(values):
    steps = range(0, 2 * len(values), 2)
    settled_step = settles(steps, values, 0.5)
    points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    # Search backwards from the end for the last point below the level.
    stretch_start, last_below = None, None
    for step, value in reversed(points):
        if value < 0.5:
            last_below = step
            break
        stretch_start = step
    if stretch_start is None:
        assert settled_step is None
    elif last_below is None:
        assert settled_step == stretch_start
    else:
        assert settled_step is not None
        assert last_below <= settled_step <= stretch_start


def test_the_settling_step_is_interpolated_linearly():
    assert settles([0, 10, 20, 30], [0.95, 0.5, 0.7, 1.0], 0.9) == pytest.approx(20 + 10 * 2 / 3)


def float64_cosine(left_tensors, right_tensors):
    """Return the cosine of two lists of tensors, each concatenated into one vector."""
    left, right = (
        np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
        for tensors in (left_tensors, right_tensors)
    )
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def test_cosines_equal_those_of_the_full_matrices():
    generator = torch.Generator().manual_seed(0)
    left, right = recorded_runs.factors(generator), recorded_runs.factors(generator)

    def tensors_of(factors):
        A = [layer.A for layer in factors]
        B = [layer.B for layer in factors]
        # The full product B A, (out, in), which the tested code never computes
        product = [layer.B.double() @ layer.A.double() for layer in factors]
        return {"A": A, "B": B, "factors": A + B, "product": product}

    left_tensors, right_tensors = tensors_of(left), tensors_of(right)
    cosines = curves.cosines(left, right)
    assert cosines.keys() == left_tensors.keys()
    for name, cosine in cosines.items():
        expected = float64_cosine(left_tensors[name], right_tensors[name])
        assert cosine == pytest.approx(expected, abs=1e-12)
    # Factors of different ranks have no cosine, but their products have one.
    wider = curves.cosines(left, recorded_runs.factors(generator, rank=3))
    assert [name for name, cosine in wider.items() if cosine is not None] == ["product"]
    zero = [layer._replace(B=torch.zeros_like(layer.B)) for layer in left]
    assert curves.cosines(zero, left)["product"] is None


def test_curves_equal_the_cosines_of_snapshots_for_one_layer_and_for_all(tmp_path):
    run = recorded_runs.make(tmp_path / "run")
    layer = "unet.up.to_out"
    run_curves = curves.read(open_run(run, "run"), [layer])
    files = snapshots.steps(run)
    last, middle = snapshots.read(files[10]), snapshots.read(files[4])
    for name, indices in ((curves.ALL_LAYERS, [0, 1, 2]), (layer, [2])):
        values = run_curves[name].values
        assert values["primary/product"][10] == pytest.approx(1)
        for role, adapter, final_adapter in (
            ("primary", PRIMARY, PRIMARY),
            ("auxiliary", AUXILIARY, AUXILIARY),
            (curves.CROSS, AUXILIARY, PRIMARY),
        ):
            factors = [middle.factors[adapter][index] for index in indices]
            final_factors = [last.factors[final_adapter][index] for index in indices]
            for quantity, value in curves.cosines(factors, final_factors).items():
                assert values[f"{role}/{quantity}"][4] == value
        assert values["auxiliary_norm"][3] == 0.05
    with pytest.raises(UserError, match="lacks layer"):
        curves.read(open_run(run, "run"), ["layer.3"])
    # Random subspaces of rank 2 overlap by 2 / size. This layer is (4, 7); the others have 6 rows.
    assert run_curves[layer].chance == {"column_overlap": 2 / 4, "row_overlap": 2 / 7}
    mean_overlap = (2 / 6 + 2 / 6 + 2 / 4) / 3
    all_layers = run_curves[curves.ALL_LAYERS]
    assert all_layers.chance["column_overlap"] == pytest.approx(mean_overlap)


def test_layers_with_separate_curves_are_evenly_spaced():
    names = [f"layer.{index}" for index in range(10)]
    assert curves.spread(names, 4) == ["layer.0", "layer.3", "layer.6", "layer.9"]
    assert curves.spread(names[:2], 4) == names[:2]


def auxiliary_share(step):
    """Return the auxiliary's share of its way to the final weights, near 0 until the last step."""
    if step == 10:
        return 1.0
    return 0.1 * (step / 10) ** 20


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """Measure three Bi-LoRA runs, whose auxiliaries move only at the end, and two of LoRA-SAM."""
    folder = tmp_path_factory.mktemp("late")
    runs = []
    course = {AUXILIARY: auxiliary_share}
    for seed in range(3):
        runs.append(recorded_runs.make(folder / f"b{seed}", "bilora", seed, course=course))
    ratio = (100.0, 2e4, 3e4)  # two of the three layers are above 1e4
    for seed in range(2):
        runs.append(recorded_runs.make(folder / f"sam{seed}", "lora-sam", seed, ratio=ratio))
    return folder, result_of(dynamics.main, folder / "out", *runs)


def test_key_figures_agree_with_the_curves_and_all_files_are_written(late):
    folder, result = late
    for adapter in ("primary", "auxiliary"):
        for row in result.select(f"settled {adapter}/product"):
            all_layers = curves.read(open_run(folder / row.subject, ""))[curves.ALL_LAYERS]
            cosine_of_step = all_layers.values[f"{adapter}/product"]
            steps, cosines = list(cosine_of_step), list(cosine_of_step.values())
            assert row.value == settles(steps, cosines, 0.9)
        rows = result.select(f"settled {adapter}/product", "Bi-LoRA")
        line = result.summary("Bi-LoRA", f"settled {adapter}/product")
        assert line.mean == pytest.approx(np.mean([row.value for row in rows]))
    curve = result.curve("Bi-LoRA", "auxiliary/product")
    rows = result.select("auxiliary/product", "Bi-LoRA")
    values = np.array([row.value for row in rows], dtype=float).reshape(3, 11)  # (runs, steps)
    assert [point.mean for point in curve] == pytest.approx(values.mean(axis=0))
    lag = result.summary("Bi-LoRA", "lag product")
    layers_above = result.summary("LoRA-SAM", "layers_above")
    assert lag.low > 0  # the auxiliary settles after the primary
    assert layers_above.mean == pytest.approx(2 / 3)
    assert {row.item for row in result.rows if row.item} == set(recorded_runs.SHAPES)

    names = ["fig2_lora_sam.png", "figA4_layers.png", "figA2_convergence.png", "auxiliary.png"]
    assert result.figures == names
    out = folder / "out"
    assert all((out / name).stat().st_size > 10_000 for name in names)
    tables = [table.FILE, table.REPORT, table.ROWS, table.SUMMARY]
    assert sorted(path.name for path in out.iterdir()) == sorted(names + tables)
    for name in tables:
        assert str(folder) not in (out / name).read_text()


STEPS = (0, 10, 20, 30)


def losses(method, seed):
    """Return step -> (training loss, held-out loss).

    The training loss falls. The held-out loss falls and rises at the end, less for Bi-LoRA.
    """
    rise = 0.002 if method == "lora" else 0.0015 + 1e-4 * seed
    losses_of_step = {}
    for step in STEPS:
        training, heldout = 0.1 - 0.001 * step, 0.1 - 0.0005 * step + 1e-3 * seed
        if step == STEPS[-1]:
            heldout += rise
        losses_of_step[step] = (training, heldout)
    return losses_of_step


def heldout_losses(method):
    """Return the held-out losses of four seeds, (seeds, steps)."""
    return np.array([[heldout for _, heldout in losses(method, s).values()] for s in range(4)])


def make(folder, method, seed):
    run = folder / f"{method}{seed}"
    return recorded_runs.make(run, method, seed, STEPS[1:], losses=losses(method, seed))


def measure(folder, runs):
    return result_of(generalization.main, folder / "out", *runs)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [make(folder, "bilora", seed) for seed in range(4)]
    runs += [make(folder, "lora", seed) for seed in range(4)]
    return measure(folder, runs)


def test_losses_gaps_and_differences_agree_with_the_logs(result):
    assert (result.groups, result.control) == (["Bi-LoRA", "LoRA"], "LoRA")
    for group, method in (("Bi-LoRA", "bilora"), ("LoRA", "lora")):
        heldout = heldout_losses(method).mean(axis=0)
        training = np.array([losses(method, 0)[step][0] for step in STEPS])  # equal for each seed
        for name, means in (
            (TRAINING_GRID_LOSS, training),
            (HELDOUT_LOSS, heldout),
            (GAP, heldout - training),
        ):
            curve = result.curve(group, name)
            assert [point.step for point in curve] == list(STEPS)
            assert [point.mean for point in curve] == pytest.approx(means)
    heldout = heldout_losses("bilora")
    differences = heldout[:, -1] - heldout_losses("lora")[:, -1]
    final = result.summary("Bi-LoRA", f"final {GAP}")
    assert (final.difference, final.lower) == (pytest.approx(differences.mean()), 4)
    best = result.summary("Bi-LoRA", f"best {HELDOUT_LOSS}")
    assert best.mean == pytest.approx(heldout.min(axis=1).mean())
    # All runs reach the same training loss at their last step.
    equal = result.summary("Bi-LoRA", f"equal_training {HELDOUT_LOSS}")
    assert equal.mean == pytest.approx(heldout[:, -1].mean())
    assert result.settings["equal_training"]["training_loss"] == pytest.approx(0.07)


def test_runs_on_different_data_are_not_paired_and_notes_name_the_kind_of_data(result, tmp_path):
    assert "held-out images" in result.notes[0]
    run_losses, config = losses("lora", 0), {"model_name_or_path": "smollm2"}
    text = recorded_runs.make(tmp_path / "text", "lora", 0, STEPS[1:], config, losses=run_losses)
    (note, *_) = measure(tmp_path, [text]).notes
    assert "held-out rows" in note
    assert "noise" not in note
    runs = [make(tmp_path, method, 0) for method in ("bilora", "lora")]
    file = runs[0] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"digest": "0-', '"digest": "other-'))
    result = measure(tmp_path, runs)
    assert all(line.difference is None for line in result.summaries)
    assert any("saw different data or noise" in note for note in result.notes)
    assert "not paired" in (tmp_path / "out" / "report.md").read_text()


def test_held_out_metrics_are_plotted_over_training(tmp_path):
    config = {"model_name_or_path": "smollm2"}
    runs = []
    for method, gain in (("lora", 0.0), ("bilora", 0.01)):
        for seed in range(2):
            run = recorded_runs.make(
                tmp_path / f"{method}{seed}",
                method,
                seed,
                STEPS[1:],
                config,
                losses=losses(method, seed),
            )
            with (run / "metrics.jsonl").open("a") as log:
                for step in STEPS[1:]:
                    log.write(f'{{"step": {step}, "heldout_accuracy": {step / 100 + gain}}}\n')
                log.write(f'{{"step": {STEPS[-1]}, "heldout_f1": 0.5}}\n')  # only at the end
            runs.append(run)
    result = measure(tmp_path, runs)
    curve = result.curve("Bi-LoRA", "heldout_accuracy")
    assert [point.step for point in curve] == list(STEPS[1:])
    assert [point.difference for point in curve] == pytest.approx([0.01] * 3)
    final = result.summary("Bi-LoRA", "final heldout_accuracy")
    assert (final.mean, final.higher) == (pytest.approx(0.31), 2)
    command = object.__new__(generalization.Generalization)
    (upper_row, _) = command.panels(result)["generalization.png"]
    assert [panel.title for panel in upper_row][3:] == ["held-out accuracy"]
    assert "| held-out F1 | difference |" in (tmp_path / "out" / table.REPORT).read_text()


def test_the_report_has_the_last_steps_loss_by_noise_level(tmp_path):
    runs = []
    for method, at_level_125 in (("lora", 0.2), ("bilora", 0.15)):
        run = make(tmp_path, method, 0)
        log = run / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            # The report must have only the last step's value.
            is_last = line["step"] == STEPS[-1]
            line["heldout_loss_by_level/125"] = at_level_125 if is_last else 9.0
            line["heldout_loss_by_level/25"] = 0.5
        log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        runs.append(run)
    measure(tmp_path, runs)
    report = (tmp_path / "out" / table.REPORT).read_text()
    assert "| noise level | LoRA | Bi-LoRA minus LoRA |" in report
    # Losses are multiplied by 1000, and levels are in numerical order.
    assert report.index("| 25 | 500.00 |") < report.index("| 125 | 200.00 | -50.00 [n/a], 1/1 |")
