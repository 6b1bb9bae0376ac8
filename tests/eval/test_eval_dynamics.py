"""eval.curves: groups, bands, cosines and verdicts, each against a plain computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.run import snapshots
from eval.curves import claims, courses, dynamics_plots, dynamics_report, groups
from eval.curves.bands import Curve, Estimate, common_steps, curve, settles
from eval.curves.dynamics_plots import _positive
from eval.curves.dynamics_result import DynamicsResult, measure
from eval.records import DYNAMICS
from eval.statistics import Interval
from tests.run import recorded_runs

COSINES = st.lists(st.floats(-1, 1) | st.none(), max_size=12)


@given(COSINES)
def test_settling_is_the_start_of_the_last_stretch_above(values: list[float | None]) -> None:
    found = settles(range(0, 2 * len(values), 2), values, 0.5)
    points = [(2 * i, v) for i, v in enumerate(values) if v is not None]
    stays = [step for i, (step, _) in enumerate(points) if all(v >= 0.5 for _, v in points[i:])]
    if not stays:
        assert found is None
    else:
        earlier = [step for step, _ in points if step < stays[0]]
        assert found is not None
        assert (earlier[-1] if earlier else stays[0]) <= found <= stays[0]


def test_settling_is_interpolated() -> None:
    assert settles([0, 10, 20, 30], [0.95, 0.5, 0.7, 1.0], 0.9) == pytest.approx(20 + 10 * 2 / 3)
    assert settles([0, 10], [None, 0.95], 0.9) == 10
    assert settles([], [], 0.9) is None


def test_a_curve_is_mean_and_standard_error() -> None:
    runs = [{1: 1.0, 2: 4.0, 3: None}, {1: 2.0, 2: 6.0, 3: 1.0}, {1: 6.0, 2: 5.0, 3: 1.0}]
    found = curve([1, 2, 3], runs)
    values = np.array([[1, 2, 6], [4, 6, 5]], dtype=float)
    assert found.mean[:2] == pytest.approx(values.mean(1))
    assert found.error[:2] == pytest.approx(values.std(1, ddof=1) / np.sqrt(3))
    assert (found.mean[2], found.error[2]) == (None, None)
    assert common_steps("x", [[1, 2, 4], [2, 4, 8]]) == [2, 4]
    with pytest.raises(UserError, match='the runs of "x" have no recorded step in common'):
        common_steps("x", [[1], [2]])


def test_a_logarithmic_axis_gets_no_zeros() -> None:
    found = _positive(Curve([0, 1, 2], [0.0, 2.0, None], [0.0, 5.0, None]))
    assert found.mean == [None, 2.0, None]
    assert found.error == [None, pytest.approx(1.98), None]


def test_cosines_are_those_of_the_whole_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = recorded_runs.factors(generator), recorded_runs.factors(generator)
    found = courses.cosines(one, other)

    def naive(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
        a, b = (np.concatenate([x.double().numpy().ravel() for x in s]) for s in (left, right))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    parts = {
        "A": [[f.A for f in side] for side in (one, other)],
        "B": [[f.B for f in side] for side in (one, other)],
        "factors": [[x for f in side for x in (f.A, f.B)] for side in (one, other)],
        "product": [[f.B.double() @ f.A.double() for f in side] for side in (one, other)],
    }
    for name, (left, right) in parts.items():
        assert found[name] == pytest.approx(naive(left, right), abs=1e-12)
    wider = courses.cosines(one, recorded_runs.factors(generator, rank=3))
    assert [wider[name] is None for name in courses.QUANTITIES] == [True, True, True, False]
    zero = [f._replace(B=torch.zeros_like(f.B)) for f in one]
    assert courses.cosines(zero, one)["product"] is None


def test_a_course_over_one_layer_and_over_all(tmp_path: Path) -> None:
    run = recorded_runs.make(tmp_path / "run")
    layer = "unet.up.to_out"
    found = courses.read(run, [courses.ALL, layer])
    files = snapshots.steps(run)
    last, middle = snapshots.read(files[10]), snapshots.read(files[4])
    for name, where in ((courses.ALL, [0, 1, 2]), (layer, [2])):
        values = found[name].values
        assert values["primary/product"][10] == pytest.approx(1)
        for role, of, to in (
            ("primary", PRIMARY, PRIMARY),
            ("auxiliary", AUXILIARY, AUXILIARY),
            (courses.CROSS, AUXILIARY, PRIMARY),
        ):
            own, end = ([s.factors[a][i] for i in where] for s, a in ((middle, of), (last, to)))
            for quantity, value in courses.cosines(own, end).items():
                assert values[f"{role}/{quantity}"][4] == value
        assert values["auxiliary_norm"][3] == 0.05
    assert found[layer].chance == {"columns": 2 / 4, "rows": 2 / 7}
    assert found[courses.ALL].chance["columns"] == pytest.approx((2 / 6 + 2 / 6 + 2 / 4) / 3)


def test_layers_are_chosen_and_spread() -> None:
    names = [f"layer.{i}" for i in range(10)]
    assert courses.choose(names, "layer.3") == [3]
    assert courses.spread(names, 4) == ["layer.0", "layer.3", "layer.6", "layer.9"]
    assert courses.spread(names[:2], 4) == names[:2]
    with pytest.raises(UserError, match=r'"layers.3" \(did you mean "layer.3"\?\)'):
        courses.choose(names, "layers.3")


def test_groups_by_setting(tmp_path: Path) -> None:
    def run(name: str, method: str, seed: int, **config: object) -> str:
        return str(recorded_runs.make(tmp_path / name, method, seed, steps=(), config=config))

    plain = [run(f"b{seed}", "bilora", seed) for seed in (1, 0)]
    fast = run("fast", "bilora", 0, auxiliary_learning_rate=1e-2)
    # rho plays no part in LoRA, nor does where a run lies
    lora = [run(f"l{i}", "lora", i, rho=0.1 * i + 0.1, output_dir=str(i)) for i in range(2)]
    found = groups.gather([*plain, fast, *lora], [])
    assert [(group.label, list(group.runs)) for group in found] == [
        ("Bi-LoRA (auxiliary_learning_rate=0.001)", [0, 1]),
        ("Bi-LoRA (auxiliary_learning_rate=0.01)", [0]),
        ("LoRA", [0, 1]),
    ]
    assert [g.label for g in groups.gather([lora[0]], [f"mine = {plain[0]},{plain[1]}"])] == [
        "LoRA",
        "mine",
    ]
    assert groups.gather(plain, [])[0].label == "Bi-LoRA"
    other = run("again", "bilora", 0)
    with pytest.raises(UserError, match="are both seed 0"):
        groups.gather([*plain, other], [])
    with pytest.raises(UserError, match="mixes bilora and lora"):
        groups.gather([], [f"x={plain[0]},{lora[1]}"])
    with pytest.raises(UserError, match='two groups are called "LoRA"'):
        groups.gather([lora[0]], [f"LoRA={lora[1]}"])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.1, 2, "agrees"), (0, 0.9, "disagrees"), (0.5, 1.5, "unclear")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    estimate = Estimate((low + high) / 2, Interval(low, high), {})
    assert claims.above(estimate, 1) == verdict
    opposite = {"agrees": "disagrees", "disagrees": "agrees"}.get(verdict, verdict)
    assert claims.below(estimate, 1) == opposite
    assert claims.above(Estimate(9.0, None, {0: 9.0}), 1) == "unclear"


def judged(folder: Path, slow: str, ratio: tuple[float, ...]) -> DynamicsResult:
    """Five seeds of Bi-LoRA, in which one adapter moves at the end only, and two of LoRA-SAM."""
    course = {slow: lambda step: (step / 10) ** 20 * (1 if step == 10 else 0.1)}
    runs = [
        recorded_runs.make(folder / f"{slow}{seed}", "bilora", seed, course=course)
        for seed in range(5)
    ]
    runs += [
        recorded_runs.make(folder / f"sam{slow}{seed}", "lora-sam", seed, ratio=ratio)
        for seed in range(2)
    ]
    found = groups.gather([str(run) for run in runs], [])
    return measure(found, courses.ALL, "python -m eval.dynamics")


def test_the_claims_follow_the_data(tmp_path: Path) -> None:
    late = judged(tmp_path, AUXILIARY, (2e4, 3e4, 4e4))
    early = judged(tmp_path, PRIMARY, (100.0, 200.0, 300.0))
    for result, slower, third in ((late, "agrees", "agrees"), (early, "disagrees", "disagrees")):
        verdicts = {claim.claim: claim.verdict for claim in result.claims}
        assert verdicts["the auxiliary converges substantially slower than the primary"] == slower
        found = next(claim for claim in result.claims if claim.source == "Fig. 2b")
        assert found.verdict == third
        text = dynamics_report.to_markdown(result)
        words = "agree" if slower == "agrees" else "disagree"
        assert f"slower than the primary. These runs {words} (Bi-LoRA)" in text
    mixed = judged(tmp_path / "mixed", AUXILIARY, (100.0, 2e4, 3e4))
    found = next(claim for claim in mixed.claims if claim.source == "Fig. 2b")
    assert found.verdict == "in part"
    assert "67% [67%, 67%] of the layers" in found.evidence
    for who in ("primary", "auxiliary"):
        settled = late.groups[0].settles[f"{who}/product"]
        for seed, value in settled.values.items():
            course = courses.read(tmp_path / f"{AUXILIARY}{seed}", [courses.ALL])[courses.ALL]
            steps, cosines = zip(*course.values[f"{who}/product"].items(), strict=True)
            assert value == settles(steps, cosines, 0.9)
        assert settled.mean == pytest.approx(np.mean(list(settled.values.values())))


def test_the_json_is_strict_and_the_figures_are_drawn(tmp_path: Path) -> None:
    result = judged(tmp_path, AUXILIARY, (100.0, 2e4, 3e4))
    record = json.loads(DYNAMICS.text(result), parse_constant=pytest.fail)
    assert (record["kind"], record["schema_version"]) == ("dynamics", 1)
    assert record["runs"] == ["Bi-LoRA", "LoRA-SAM"]
    assert record["provenance"]["command"] == "python -m eval.dynamics"
    assert [entry["layer"] for entry in record["layers"]] == list(recorded_runs.SHAPES)
    names = dynamics_plots.draw(result, tmp_path)
    assert names == [
        "fig2_lora_sam.png",
        "figA4_layers.png",
        "figA2_convergence.png",
        "auxiliary.png",
    ]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
