"""An auxiliary for each sample against per-sample loops, and what it must not depend on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import profile

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import MethodOptions
from bilora_diffusion.methods.bilora.per_sample import Assignment, assign
from tests.contract.harness import Run as Small
from tests.contract.models import ROWS
from tests.methods.runs import STEPS, Run, batch, naive
from tests.references import methods as reference

COUNT = 5


def samples(k, rows=7):
    """Samples of step k: some twice, some not at all, and one row that is none."""
    numbers = torch.randint(2 * COUNT, (rows,), generator=torch.Generator().manual_seed(k))
    return [None if i == 0 and k % 3 == 0 else int(s) for i, s in enumerate(numbers)]


def ratios(k):
    """Signal-to-noise ratios of the rows of step k, from 0.01 to 100."""
    return (10 ** (4 * torch.rand(7, generator=torch.Generator().manual_seed(k)) - 2)).tolist()


def backward(run, k, cuts=()):
    """One pass over `batch(k)`, cut before these rows."""
    x, y = batch(k)
    step_samples, snr, total = samples(k), ratios(k), torch.zeros((), dtype=torch.float64)
    for start, stop in zip((0, *cuts), (*cuts, len(x)), strict=True):
        with run.method.around_batch(step_samples[start:stop], snr[start:stop]):
            errors = (run.model(x[start:stop]) - y[start:stop]).square().mean(1)
            loss = errors.sum() / len(x)
            loss.backward()
        total += loss.detach()
    return total


def flats(method):
    return {k: v.clone() for k, v in method.tensors().items() if "/auxiliary/" in k}


@pytest.mark.parametrize(
    ("kind", "lr", "rho", "gamma", "cuts"),
    [
        ("SGD", 0.1, 0.05, 0, ()),
        ("SGD", 0.1, 0.05, 0, tuple(range(1, 7))),
        ("AdamW", 5e-3, 0.3, 2, (2, 5)),
    ],
    ids=["whole", "row by row", "in three"],
)
def test_50_steps_follow_per_sample_loops(kind, lr, rho, gamma, cuts):
    """Acceptance: float64, to 1e-10, however the batch is cut."""
    auxiliary_options: Any = {
        "auxiliary_rank": 2,
        "auxiliary_alpha": 3,
        "auxiliary_learning_rate": 2 * lr,
    }
    single_run = Run("bilora", MethodOptions(rho=rho, **auxiliary_options), kind, lr)
    options = MethodOptions(
        auxiliaries=COUNT, auxiliary_snr_gamma=gamma, rho=rho, **auxiliary_options
    )
    run = Run("bilora", options, kind, lr)
    first, *auxiliary_nets = (naive(single_run) for _ in range(1 + COUNT))
    net = reference.Net([replace(la, A2=None, B2=None) for la in first.layers], first.rules)
    expected, moved = [], 0
    for k in range(STEPS):
        before = [auxiliary_net.layers[0].A2 for auxiliary_net in auxiliary_nets]
        groups = [None if s is None else s % COUNT for s in samples(k)]
        shares = [(min(ratio / gamma, 1) if gamma else 1) ** 0.5 for ratio in ratios(k)]
        expected.append(reference.by_sample(net, *batch(k), rho, auxiliary_nets, groups, shares))
        moved += sum(a is not o.layers[0].A2 for a, o in zip(before, auxiliary_nets, strict=True))
    assert moved < STEPS * COUNT, "some must have stood still"
    losses = run.train(backward=lambda k: backward(run, k, cuts))
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    for factor, layer in zip(adapters.factors(run.model, PRIMARY), net.layers, strict=True):
        torch.testing.assert_close([factor.A, factor.B], [layer.A, layer.B], rtol=1e-10, atol=1e-10)
    for flat, auxiliary_net in zip(flats(run.method).values(), auxiliary_nets, strict=True):
        layers: Any = auxiliary_net.layers
        expected_flat = torch.cat(
            [la.A2.flatten() for la in layers] + [la.B2.T.flatten() for la in layers]
        )
        torch.testing.assert_close(flat, expected_flat, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("option", ["default", "dora", "pissa", "nf4"])
def test_a_batch_of_several_samples_is_what_they_are_one_by_one(option):
    """On convolutions and linear layers of one shape and of several."""
    losses, tensors = [], []
    settings: Any = {"options": {"auxiliaries": 3, "rho": 0.5}, "optimizer": "SGD", "lr": 0.1}
    for pieces in (1, ROWS):
        run = Small("bilora", option, "unet", micro_batches=pieces, **settings).initialise()
        losses.append(run.train(2))
        tensors.append(run.tensors())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors[0], tensors[1], rtol=1e-4, atol=2e-5)
    assert len(set(losses[0])) == len(losses[0])


@pytest.mark.parametrize("rho", [0.05, "auto"])
def test_a_step_of_no_samples_moves_the_primary_alone(rho):
    run = Run("bilora", MethodOptions(auxiliaries=COUNT, rho=rho))
    run.train(3, backward=lambda k: backward(run, k))
    before, primary = flats(run.method), {k: v.clone() for k, v in run.primary().items()}

    def backward_without_samples(k):
        with run.method.around_batch([None] * 7):
            return run.backward(k)

    run.train(1, backward=backward_without_samples)
    assert all(torch.equal(value, before[key]) for key, value in flats(run.method).items())
    assert any(not torch.equal(value, primary[key]) for key, value in run.primary().items())


def test_a_step_takes_as_many_operations_however_many_there_are():
    counted = []
    for number in (8, 80):
        run = Run("bilora", MethodOptions(auxiliaries=number))

        def forward_backward(run=run):
            with run.method.around_batch(range(7)):
                return run.backward()

        run.method.step(forward_backward, run.optimizer)
        with profile() as operations:
            run.method.step(forward_backward, run.optimizer)
        counted.append(sum(operation.count for operation in operations.key_averages()))
    assert counted[0] == counted[1] > 0


def test_samples_are_dealt_by_name_as_evenly_as_can_be():
    names = [f"{n}.png" for n in (7, 2, 9, 4, 5)]
    assert assign(2, names) == Assignment(2, [1, 0, 0, 1, 0])
    assert assign(9, names).count == 5
    options = MethodOptions(auxiliaries="sample", sample_names=tuple(names))
    assert len(flats(Run("bilora", options).method)) == 5


def test_more_than_can_be_kept_and_rows_that_are_not_the_samples_are_refused():
    for names, fix in (((), "give that number"), (tuple(map(str, range(513))), "512")):
        with pytest.raises(UserError, match=fix):
            Run("bilora", MethodOptions(auxiliaries="sample", sample_names=names))
    run = Run("bilora", MethodOptions(auxiliaries=COUNT))
    with pytest.raises(UserError, match="7 rows for 3 samples"), run.method.around_batch([0, 1, 2]):
        run.model(batch(0)[0])
    with (
        pytest.raises(UserError, match="2 ratios for 3"),
        run.method.around_batch([0, 1, 2], [1, 2]),
    ):
        pass
