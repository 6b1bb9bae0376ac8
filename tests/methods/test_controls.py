"""The controls of `benchmarks/controls.py` do what their names say."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.methods import MethodOptions, Target, create, registry
from tests.contract.models import UNET_TARGETS, tiny_unet
from tests.methods.runs import Run, batch, naive, same
from tests.references import methods as reference

CONTROLS = Path(__file__).resolve().parents[2] / "benchmarks" / "controls.py"
HALVES = (slice(0, 4), slice(4, 7))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    runpy.run_path(str(CONTROLS))


def test_t_lora_masks_the_last_ranks_of_the_noisiest_rows():
    model, method = tiny_unet(), create("t-lora")
    spec = AdapterSpec(rank=8, alpha=8, target_modules=UNET_TARGETS)
    method.setup([Target("unet", model, spec, 1e-3)])
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    for timestep, acting in ((0, 8), (499, 6), (500, 6), (501, 5), (999, 4)):
        model.zero_grad()
        model(latents, torch.tensor([timestep]), context).sample.square().sum().backward()
        for name, layer in method.layers():
            gradient = adapters.weights(layer, PRIMARY)[1].grad
            columns = gradient.flatten(1).abs().sum(0) > 0
            if "conv" in name or "to_out" in name:  # where every hidden channel matters
                assert columns.tolist() == [True] * acting + [False] * (8 - acting), timestep


def halves(run):
    """A pass over two micro-batches of 4 and 3 rows, as the loop makes them."""

    def work(k):
        x, y = batch(k)
        losses = []
        for rows in HALVES:
            with run.method.seen(list(range(7))[rows]):
                loss = (run.model(x[rows]) - y[rows]).square().mean() / 2
                loss.backward()
            losses.append(loss.detach())
        return sum(losses, torch.zeros(()))

    return work


def test_sam_by_batch_perturbs_each_micro_batch_by_its_own_gradient():
    run = Run("sam-by-batch", MethodOptions(rho=0.2), "SGD", 0.1)
    net = naive(run)
    for k in range(10):
        x, y = batch(k)
        parts = [reference.sam_gradients(net, x[r], y[r], 0.2)[1] for r in HALVES]
        net.descend([{n: (a[n] + b[n]) / 2 for n in a} for a, b in zip(*parts, strict=True)])
        run.train(1, first=k, backward=halves(run))
    same(run, net)


@pytest.mark.parametrize("name", ["bilora-random", "bilora-frozen"])
def test_auxiliaries_that_are_no_memory_of_their_sample(name):
    names = tuple(map(str, range(7)))
    options = MethodOptions(rho=0.5, auxiliaries="sample", sample_names=names)
    run: Any = Run(name, options)
    before = [p.detach().clone() for p in run.method.apart()]
    run.train(6, backward=halves(run))
    moved = [not torch.equal(p, b) for p, b in zip(run.method.apart(), before, strict=True)]
    assert all(value.isfinite().all() for value in run.method.tensors().values())
    if name == "bilora-frozen":
        assert not any(moved)
        torch.testing.assert_close(run.method.auxiliary.norms, torch.full((7,), 0.5).double())
    else:
        assert any(moved)
