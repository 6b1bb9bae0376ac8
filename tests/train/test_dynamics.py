"""dynamics and snapshots: every figure against full matrices in float64, and what a flag costs."""

import copy
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec, Factors
from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.methods import MethodOptions, Target, create
from bilora_diffusion.run import snapshots
from bilora_diffusion.train import dynamics
from bilora_diffusion.train.dynamics import Dynamics
from tests.contract.models import tiny_mlp
from tests.run import recorded_runs

TARGETS, DUE = ("first", "conv", "last"), 2


def product(f):
    return f.scale * f.B.double() @ f.A.double()


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    return recorded_runs.factors(generator), recorded_runs.factors(generator, rank=3)


def test_figures_of_a_pair_are_those_of_full_matrices(pair):
    """And the overlap is that of scipy's principal angles."""
    left, right = pair
    expected = [float((product(f) * product(g)).sum()) for f, g in zip(left, right, strict=True)]
    assert dynamics.inner_products(left, right).tolist() == pytest.approx(expected, rel=1e-12)
    norms = [[float(product(f).norm()) for f in side] for side in pair]
    assert dynamics.norms(left).tolist() == pytest.approx(norms[0], rel=1e-12)
    figures = dynamics.alignment(left, right)
    cosines = [inner / a / b for inner, a, b in zip(expected, *norms, strict=True)]
    assert figures["product_cosine"].tolist() == pytest.approx(cosines)
    for name, sides in (
        ("column_overlap", [(f.B, g.B) for f, g in zip(left, right, strict=True)]),
        ("row_overlap", [(f.A.T, g.A.T) for f, g in zip(left, right, strict=True)]),
    ):
        angles = [subspace_angles(f.double().numpy(), g.double().numpy()) for f, g in sides]
        assert figures[name].tolist() == pytest.approx([np.mean(np.cos(a) ** 2) for a in angles])
    side_norms = [float(torch.tensor(side).norm()) for side in norms]
    total = dynamics.totals(figures)
    assert total["product_cosine"] == pytest.approx(sum(expected) / side_norms[0] / side_norms[1])
    assert total["norm_primary"] == pytest.approx(side_norms[0])


def test_an_adapter_that_is_zero_has_no_direction_but_the_others_count(pair):
    left, right = pair
    right[1] = right[1]._replace(B=torch.zeros_like(right[1].B))
    figures = dynamics.alignment(left, right)
    assert figures["product_cosine"].isnan().tolist() == [False, True, False]
    overlap = dynamics.totals(figures)["column_overlap"]
    assert overlap == pytest.approx(float(figures["column_overlap"][[0, 2]].mean()))
    zero = [f._replace(B=torch.zeros_like(f.B)) for f in right]
    total = dynamics.totals(dynamics.alignment(left, zero))
    assert total["product_cosine"] is total["column_overlap"] is None


class Training:
    """A method on a small model, with or without a record; the batch is always the same."""

    def __init__(self, name, record, folder=None, **options):
        self.model = tiny_mlp()
        self.x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        self.method = create(name, MethodOptions(num_steps=9, **options))
        spec = AdapterSpec(rank=2, alpha=3, target_modules=TARGETS)
        torch.manual_seed(2)
        groups = self.method.setup([Target("model", self.model, spec, 1e-2)])
        self.optimizer = torch.optim.AdamW(groups)
        self.cfg = SimpleNamespace(dynamics_steps=DUE)
        self.num_steps, self.step, self.folder = 5, 0, folder
        self.dynamics = Dynamics(self, self.optimizer) if record else None
        self.method.bind(self.optimizer)

    def loss(self, model):
        return (model(self.x) - 1).square().mean()

    def _forward_backward(self):
        loss = self.loss(self.model)
        loss.backward()
        return loss.detach()

    def train(self, steps=5):
        lines = []
        for _ in range(steps):
            if self.dynamics and self.folder and self.step == 0:
                self.dynamics.write(self.folder)
            loss = self.method.step(self._forward_backward, self.optimizer)
            self.step += 1
            lines.append({"loss": float(loss), **(self.dynamics.values() if self.dynamics else {})})
            if self.dynamics and self.folder:
                self.dynamics.write(self.folder)
        return lines

    def full_gradients(self):
        """dL/dW of every layer's weight, at the weights as they act now; on a copy."""
        model = copy.deepcopy(self.model)
        layers = adapters.layers(model, PRIMARY)
        for _, layer in layers:
            adapters.base_weight(layer).requires_grad_(True)
        self.loss(model).backward()
        return {
            f"model.{path}": cast(Tensor, adapters.base_weight(layer).grad).flatten(1).double()
            for path, layer in layers
        }


@pytest.mark.parametrize("name", ["lora-sam", "bilora"])
def test_the_record_changes_no_bit(name, tmp_path):
    off, on = Training(name, False), Training(name, True, tmp_path)
    losses = [[line["loss"] for line in run.train()] for run in (off, on)]
    assert losses[0] == losses[1]
    tensors, recorded = off.method.tensors(), on.method.tensors()
    assert all(torch.equal(tensors[key], recorded[key]) for key in tensors)
    assert list(snapshots.steps(tmp_path)) == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("name", "figure"), [("bilora", "ascent_gain"), ("lora-sam", "norm_first_order")]
)
def test_a_layer_without_a_gradient_counts_as_zero(name, figure, tmp_path, monkeypatch):
    def loss(run, model):
        return (model.first(run.x) - 1).square().mean()  # nothing reaches the other two

    monkeypatch.setattr(Training, "loss", loss)
    run = Training(name, True, tmp_path)
    line = run.train(2)[1]["dynamics"]
    layers = snapshots.read(snapshots.steps(tmp_path)[2]).layers
    assert layers[figure][0] != 0
    assert layers[figure][1:].tolist() == [0, 0]
    assert line[figure] == pytest.approx(float(layers[figure][0]))


def test_the_terms_of_equation_5_are_measured_at_the_perturbation(tmp_path):
    run = Training("lora-sam", True, tmp_path, rho=0.03)
    run.train(1)
    copied = copy.deepcopy(run.model)
    factors = adapters.factors(copied, PRIMARY)
    run.loss(copied).backward()
    gradients = adapters.gradients_of(adapters.layers(copied, PRIMARY), PRIMARY)
    assert None not in gradients
    gradients = cast(list[Factors], gradients)
    norm = sum(float(g.A.double().square().sum() + g.B.double().square().sum()) for g in gradients)
    line = run.train(1)[0]["dynamics"]
    layers = snapshots.read(snapshots.steps(tmp_path)[2]).layers
    squares = dict.fromkeys((*dynamics.TERMS, dynamics.FIRST_ORDER, dynamics.PRODUCT), 0.0)
    for i, (f, g) in enumerate(zip(factors, gradients, strict=True)):
        eA, eB = (0.03 * side.double() / norm**0.5 for side in (g.A, g.B))
        B, A = f.B.double(), f.A.double()
        terms = (B @ eA, eB @ A, eB @ eA, B @ eA + eB @ A, B @ A)
        for key, matrix in zip(squares, terms, strict=True):
            value = f.scale * float(matrix.norm())
            assert float(layers[key][i]) == pytest.approx(value, rel=1e-4)
            squares[key] += value**2
    for key, value in squares.items():
        assert line[key] == pytest.approx(value**0.5, rel=1e-4)
    expected = (squares["norm_first_order"] / squares["norm_eBeA"]) ** 0.5
    assert line["ratio"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [{"auxiliary_rank": 3}, {"auxiliary_direction": "descent"}])
def test_the_ascent_gain_is_the_gradient_times_the_weight(options, tmp_path):
    run = Training("bilora", True, tmp_path, rho=0.3, **options)
    run.train(1)
    gradients = run.full_gradients()
    auxiliary = adapters.factors_of(run.method.layers, AUXILIARY)
    expected = [float((gradients[f.name] * product(f)).sum()) for f in auxiliary]
    assert max(map(abs, expected)) > 0
    line = run.train(1)[0]["dynamics"]
    snapshot = snapshots.read(snapshots.steps(tmp_path)[2])
    assert snapshot.layers["ascent_gain"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert line["ascent_gain"] == pytest.approx(sum(expected), rel=1e-4)
    assert snapshot.names == [f.name for f in auxiliary]
    current = adapters.factors_of(run.method.layers, AUXILIARY)
    for saved, layer in zip(snapshot.factors[AUXILIARY], current, strict=True):
        assert torch.equal(saved.A, layer.A)
        assert torch.equal(saved.B, layer.B)
        assert saved.scale == layer.scale


def test_snapshots_come_back_and_are_cut_and_damage_is_named(tmp_path):
    run = recorded_runs.make(tmp_path / "run", steps=(0, 2, 9, 10))
    assert list(snapshots.steps(run)) == [0, 2, 9, 10]
    path = snapshots.steps(run)[9]
    snapshot = snapshots.read(path)
    assert (snapshot.step, snapshot.names) == (9, list(recorded_runs.SHAPES))
    assert snapshot.factors[PRIMARY][0].A.dtype == torch.float32
    content = path.read_bytes()
    later = content.replace(rb"\"schema_version\": 1", rb"\"schema_version\": 7")
    renamed = content.replace(b"schema_version", b"schema_versiom")
    for damaged in (content[:100], b"", renamed, later):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="version 7" if damaged == later else path.name):
            snapshots.read(path)
    (run / "dynamics" / ".tmp-step-3.safetensors").write_bytes(b"torn")
    snapshots.truncate(run, 8)
    names = sorted(file.name for file in (run / "dynamics").iterdir())
    assert names == ["step-0.safetensors", "step-2.safetensors"]
    (tmp_path / "dynamics").touch()
    with pytest.raises(TrainingError, match="could not be written"):
        snapshots.write(tmp_path, snapshot)
