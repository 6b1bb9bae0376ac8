"""Recorded dynamics and snapshots: every value equals that of full matrices in float64."""

import copy
from types import SimpleNamespace
from typing import Any, cast

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

TARGETS = ("first", "conv", "last")
INTERVAL = 2


def product(factors):
    """Return s B A in float64, (out, in)."""
    return factors.scale * factors.B.double() @ factors.A.double()


@pytest.fixture
def sides():
    """Return primary and auxiliary factors of three layers, with different ranks."""
    generator = torch.Generator().manual_seed(3)
    return recorded_runs.factors(generator), recorded_runs.factors(generator, rank=3)


def squared_cosine(left, right):
    """Return the mean squared cosine of the principal angles of two column spaces, by scipy."""
    angles = subspace_angles(left.double().numpy(), right.double().numpy())
    return float(np.mean(np.cos(angles) ** 2))


def test_values_of_a_pair_of_adapters_equal_those_of_full_matrices(sides):
    primary, auxiliary = sides
    inner_products = dynamics.inner_products(primary, auxiliary)
    norms = dynamics.norms(primary)
    layer_values = dynamics.alignment(primary, auxiliary)
    all_products = []
    for number, (left, right) in enumerate(zip(primary, auxiliary, strict=True)):
        products = product(left), product(right)
        inner_product = float((products[0] * products[1]).sum())
        assert float(inner_products[number]) == pytest.approx(inner_product, rel=1e-12)
        assert float(norms[number]) == pytest.approx(float(products[0].norm()), rel=1e-12)
        cosine = torch.cosine_similarity(products[0].flatten(), products[1].flatten(), dim=0)
        expected = {
            "product_cosine": float(cosine),
            "column_overlap": squared_cosine(left.B, right.B),
            "row_overlap": squared_cosine(left.A.T, right.A.T),
        }
        values_of_layer = {name: float(layer_values[name][number]) for name in expected}
        assert values_of_layer == pytest.approx(expected)
        all_products.append(torch.stack(products).flatten(1))
    # For the whole model, all layers form one vector: (2, elements of all layers).
    vectors = torch.cat(all_products, dim=1)
    total = dynamics.totals(layer_values)
    cosine = torch.cosine_similarity(vectors[0], vectors[1], dim=0)
    assert total["product_cosine"] == pytest.approx(float(cosine))
    assert total["norm_primary"] == pytest.approx(float(vectors[0].norm()))


def with_zero_product(factors):
    return factors._replace(B=torch.zeros_like(factors.B))


def test_a_zero_adapter_has_no_direction_and_totals_use_the_other_layers(sides):
    primary, auxiliary = sides
    auxiliary[1] = with_zero_product(auxiliary[1])
    layer_values = dynamics.alignment(primary, auxiliary)
    assert layer_values["product_cosine"].isnan().tolist() == [False, True, False]
    overlap = dynamics.totals(layer_values)["column_overlap"]
    assert overlap == pytest.approx(float(layer_values["column_overlap"][[0, 2]].mean()))
    all_zero = [with_zero_product(factors) for factors in auxiliary]
    total = dynamics.totals(dynamics.alignment(primary, all_zero))
    assert total["product_cosine"] is total["column_overlap"] is None


class Training:
    """A method on a small model with a fixed batch; its dynamics are recorded in `folder`."""

    def __init__(self, name, folder=None, **options):
        self.model = tiny_mlp()
        self.x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        self.method = create(name, MethodOptions(num_steps=9, **options))
        spec = AdapterSpec(rank=2, alpha=3, target_modules=TARGETS)
        torch.manual_seed(2)
        groups = self.method.setup([Target("model", self.model, spec, 1e-2)])
        self.optimizer = torch.optim.AdamW(groups)
        # Attributes that `Dynamics` reads.
        self.cfg = SimpleNamespace(dynamics_steps=INTERVAL)
        self.num_steps = 5
        self.step = 0
        self.folder: Any = folder
        self.dynamics = None if folder is None else Dynamics(self, self.optimizer)
        self.method.bind(self.optimizer)

    def loss(self, model):
        return (model(self.x) - 1).square().mean()

    def _forward_backward(self):
        loss = self.loss(self.model)
        loss.backward()
        return loss.detach()

    def train(self, steps=5):
        """Take steps and return the loss of each, with its dynamics if they are recorded."""
        lines = []
        if self.dynamics and self.step == 0:
            self.dynamics.write(self.folder)
        for _ in range(steps):
            loss = self.method.step(self._forward_backward, self.optimizer)
            self.step += 1
            line: dict[str, Any] = {"loss": float(loss)}
            if self.dynamics:
                line |= self.dynamics.values()
                self.dynamics.write(self.folder)
            lines.append(line)
        return lines

    def full_gradients(self):
        """Return dL/dW of every layer's weight at the current effective weights, from a copy."""
        model = copy.deepcopy(self.model)
        layers = adapters.layers(model, PRIMARY)
        for _, layer in layers:
            adapters.base_weight(layer).requires_grad_(True)
        self.loss(model).backward()
        gradients = {}
        for path, layer in layers:
            gradient = cast(Tensor, adapters.base_weight(layer).grad)
            gradients[f"model.{path}"] = gradient.flatten(1).double()  # (out, in)
        return gradients


@pytest.mark.parametrize("name", ["lora-sam", "bilora"])
def test_recording_does_not_change_training(name, tmp_path):
    plain, recorded = Training(name), Training(name, tmp_path)
    plain_losses = [line["loss"] for line in plain.train()]
    assert [line["loss"] for line in recorded.train()] == plain_losses
    recorded_tensors = recorded.method.tensors()
    for key, tensor in plain.method.tensors().items():
        assert torch.equal(recorded_tensors[key], tensor), key
    assert list(snapshots.steps(tmp_path)) == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("name", "figure"), [("bilora", "ascent_gain"), ("lora-sam", "norm_first_order")]
)
def test_a_layer_without_a_gradient_counts_as_zero(name, figure, tmp_path, monkeypatch):
    def loss(run, model):
        return (model.first(run.x) - 1).square().mean()  # it does not depend on the other layers

    monkeypatch.setattr(Training, "loss", loss)
    run = Training(name, tmp_path)
    line = run.train(2)[1]["dynamics"]
    layers = snapshots.read(snapshots.steps(tmp_path)[2]).layers
    assert layers[figure][0] != 0
    assert layers[figure][1:].tolist() == [0, 0]
    assert line[figure] == pytest.approx(float(layers[figure][0]))


def test_the_terms_of_equation_5_are_measured_at_the_perturbation(tmp_path):
    run = Training("lora-sam", tmp_path, rho=0.03)
    run.train(1)
    model = copy.deepcopy(run.model)
    run.loss(model).backward()
    factors = adapters.factors(model, PRIMARY)
    gradients = adapters.gradients_of(adapters.layers(model, PRIMARY), PRIMARY)
    assert None not in gradients
    gradients = cast(list[Factors], gradients)
    gradient_norm = sum(float(g.A.norm() ** 2 + g.B.norm() ** 2) for g in gradients) ** 0.5

    line = run.train(1)[0]["dynamics"]
    layers = snapshots.read(snapshots.steps(tmp_path)[2]).layers
    keys = (*dynamics.TERMS, dynamics.FIRST_ORDER, dynamics.PRODUCT)
    norms = torch.zeros(len(factors), len(keys), dtype=torch.float64)
    for number, (layer, gradient) in enumerate(zip(factors, gradients, strict=True)):
        A, B = layer.A.double(), layer.B.double()
        # SAM's perturbation: rho times the gradient over its norm.
        eA = 0.03 * gradient.A.double() / gradient_norm
        eB = 0.03 * gradient.B.double() / gradient_norm
        # (B + eB)(A + eA) = BA + B eA + eB A + eB eA
        terms = (B @ eA, eB @ A, eB @ eA, B @ eA + eB @ A, B @ A)
        norms[number] = layer.scale * torch.stack([term.norm() for term in terms])
    for column, key in enumerate(keys):
        assert layers[key].tolist() == pytest.approx(norms[:, column].tolist(), rel=1e-4)
        assert line[key] == pytest.approx(float(norms[:, column].norm()), rel=1e-4)
    ratio = line["norm_first_order"] / line["norm_eBeA"]
    assert line["ratio"] == pytest.approx(ratio, rel=1e-4)


def test_the_ascent_gain_is_the_gradient_times_the_weight(tmp_path):
    run = Training("bilora", tmp_path, rho=0.3, auxiliary_rank=3)
    run.train(1)
    gradients = run.full_gradients()
    gains = {}
    for factors in adapters.factors_of(run.method.layers, AUXILIARY):
        gains[factors.name] = float((gradients[factors.name] * product(factors)).sum())
    assert any(gains.values())
    line = run.train(1)[0]["dynamics"]
    snapshot = snapshots.read(snapshots.steps(tmp_path)[2])
    measured = dict(zip(snapshot.names, snapshot.layers["ascent_gain"].tolist(), strict=True))
    assert measured == pytest.approx(gains, rel=1e-4, abs=1e-9)
    assert line["ascent_gain"] == pytest.approx(sum(gains.values()), rel=1e-4)
    current = adapters.factors_of(run.method.layers, AUXILIARY)
    for saved, factors in zip(snapshot.factors[AUXILIARY], current, strict=True):
        assert saved.name == factors.name
        assert torch.equal(saved.A, factors.A)
        assert torch.equal(saved.B, factors.B)
        assert saved.scale == factors.scale


@pytest.fixture
def run(tmp_path):
    return recorded_runs.make(tmp_path / "run", steps=(0, 2, 9, 10))


def test_snapshots_are_read_back(run):
    assert list(snapshots.steps(run)) == [0, 2, 9, 10]
    snapshot = snapshots.read(snapshots.steps(run)[9])
    assert (snapshot.step, snapshot.names) == (9, list(recorded_runs.SHAPES))
    assert snapshot.factors[PRIMARY][0].A.dtype == torch.float32


def test_a_damaged_snapshot_is_named(run):
    path = snapshots.steps(run)[9]
    content = path.read_bytes()
    # The version is JSON inside the file's JSON header.
    later = content.replace(rb"\"schema_version\": 1", rb"\"schema_version\": 7")
    renamed = content.replace(b"schema_version", b"schema_versiom")
    for damaged in (content[:100], b"", renamed, later):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="version 7" if damaged == later else path.name):
            snapshots.read(path)


def test_truncating_deletes_later_snapshots_and_incomplete_files(run):
    (run / "dynamics" / ".tmp-step-3.safetensors").write_bytes(b"torn")
    snapshots.truncate(run, 8)
    names = sorted(file.name for file in (run / "dynamics").iterdir())
    assert names == ["step-0.safetensors", "step-2.safetensors"]


def test_a_snapshot_that_cannot_be_written_is_a_training_error(run, tmp_path):
    snapshot = snapshots.read(snapshots.steps(run)[9])
    (tmp_path / "dynamics").touch()  # a file where the folder should be
    with pytest.raises(TrainingError, match="could not be written"):
        snapshots.write(tmp_path, snapshot)
