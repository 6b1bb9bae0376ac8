"""An auxiliary for each sample against per-sample loops, and what it must not depend on."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

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
from tests.methods.runs import STEPS, Run, Updates, batch, reference_net
from tests.references import methods as reference

COUNT = 5


def samples(k):
    """Samples of step k: some twice, some not at all; in each third step one row has none."""
    generator = torch.Generator().manual_seed(k)
    numbers: list[int | None] = torch.randint(2 * COUNT, (7,), generator=generator).tolist()
    if k % 3 == 0:
        numbers[0] = None
    return numbers


def ratios(k):
    """Signal-to-noise ratios of the rows of step k, from 0.01 to 100."""
    return (10 ** (4 * torch.rand(7, generator=torch.Generator().manual_seed(k)) - 2)).tolist()


def backward(run, k, cuts=()):
    """One pass over `batch(k)`, cut before these rows."""
    x, y = batch(k)
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in pairwise((0, *cuts, len(x))):
        rows = slice(start, stop)
        with run.method.around_batch(samples(k)[rows], ratios(k)[rows]):
            errors = (run.model(x[rows]) - y[rows]).square().mean(1)
            loss = errors.sum() / len(x)
            loss.backward()
        total += loss.detach()
    return total


def flat_auxiliaries(method):
    """Copies of the auxiliaries' parameters; each holds A and B of all layers."""
    return [tensor.clone() for name, tensor in method.tensors().items() if "/auxiliary/" in name]


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
    auxiliary_options = MethodOptions(
        rho=rho, auxiliary_rank=2, auxiliary_alpha=3, auxiliary_learning_rate=2 * lr
    )
    options = replace(auxiliary_options, auxiliaries=COUNT, auxiliary_snr_gamma=gamma)
    run = Run("bilora", options, kind, lr)
    # The reference has one net with the primary, and one for each auxiliary.
    single_run = Run("bilora", auxiliary_options, kind, lr)
    updates = (Updates(lr), Updates(2 * lr, ascends=True))
    net = reference_net(single_run, *updates)
    net.layers = [replace(layer, A2=None, B2=None) for layer in net.layers]
    auxiliary_nets = [reference_net(single_run, *updates) for _ in range(COUNT)]
    expected_losses = []
    moves = 0
    for k in range(STEPS):
        groups = [None if sample is None else sample % COUNT for sample in samples(k)]
        shares = [1.0] * 7
        if gamma:  # Min-SNR: the square root of min(SNR / gamma, 1)
            shares = [min(ratio / gamma, 1) ** 0.5 for ratio in ratios(k)]
        before = [auxiliary_net.layers[0].A2 for auxiliary_net in auxiliary_nets]
        loss = reference.by_sample(net, *batch(k), rho, auxiliary_nets, groups, shares)
        expected_losses.append(loss)
        for auxiliary_net, A2 in zip(auxiliary_nets, before, strict=True):
            moves += auxiliary_net.layers[0].A2 is not A2
    assert moves < STEPS * COUNT, "an auxiliary must have had a step without its samples"

    losses = run.train(backward=lambda k: backward(run, k, cuts))
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(losses, expected_losses)
    for factors, layer in zip(adapters.factors(run.model, PRIMARY), net.layers, strict=True):
        close(factors.A, layer.A)
        close(factors.B, layer.B)
    flat_tensors = flat_auxiliaries(run.method)
    for flat, auxiliary_net in zip(flat_tensors, auxiliary_nets, strict=True):
        first, second = cast(Any, auxiliary_net.layers)
        # A of all layers, then the rows of B transposed.
        matrices = (first.A2, second.A2, first.B2.T, second.B2.T)
        close(flat, torch.cat([matrix.flatten() for matrix in matrices]))


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
    # Losses that stay the same would prove nothing.
    assert len(set(losses[0])) == len(losses[0])


@pytest.mark.parametrize("rho", [0.05, "auto"])
def test_a_step_of_no_samples_moves_the_primary_alone(rho):
    run = Run("bilora", MethodOptions(auxiliaries=COUNT, rho=rho))
    run.train(3, backward=lambda k: backward(run, k))
    auxiliaries_before = flat_auxiliaries(run.method)
    primary_before = run.primary()

    def backward_without_samples(k):
        with run.method.around_batch([None] * 7):
            return run.backward(k)

    run.train(1, backward=backward_without_samples)
    for before, tensor in zip(auxiliaries_before, flat_auxiliaries(run.method), strict=True):
        assert torch.equal(tensor, before)
    primary = run.primary()
    assert any(not torch.equal(primary[name], before) for name, before in primary_before.items())


def count_operations(auxiliaries):
    """PyTorch's operations in the second step of a run."""
    run = Run("bilora", MethodOptions(auxiliaries=auxiliaries))

    def forward_backward():
        with run.method.around_batch(range(7)):
            return run.backward()

    run.method.step(forward_backward, run.optimizer)
    # The first step may build what later ones reuse.
    with profile() as operations:
        run.method.step(forward_backward, run.optimizer)
    return sum(operation.count for operation in operations.key_averages())


def test_a_step_takes_as_many_operations_however_many_auxiliaries_there_are():
    assert count_operations(8) == count_operations(80) > 0


def test_samples_are_dealt_by_name_as_evenly_as_can_be():
    names = ("7.png", "2.png", "9.png", "4.png", "5.png")
    assert assign(2, names) == Assignment(2, [1, 0, 0, 1, 0])
    assert assign(9, names).count == 5
    run = Run("bilora", MethodOptions(auxiliaries="sample", sample_names=names))
    assert len(flat_auxiliaries(run.method)) == 5


@pytest.mark.parametrize(
    ("names", "fix"), [((), "give that number"), (tuple(map(str, range(513))), "512")]
)
def test_an_auxiliary_for_each_sample_needs_names_and_not_too_many(names, fix):
    with pytest.raises(UserError, match=fix):
        Run("bilora", MethodOptions(auxiliaries="sample", sample_names=names))


def test_rows_that_are_not_the_samples_are_refused():
    run = Run("bilora", MethodOptions(auxiliaries=COUNT))
    x, _ = batch(0)
    with pytest.raises(UserError, match="7 rows for 3 samples"), run.method.around_batch([0, 1, 2]):
        run.model(x)
    around_batch = run.method.around_batch([0, 1, 2], [1, 2])
    with pytest.raises(UserError, match="2 ratios for 3"), around_batch:
        pass
