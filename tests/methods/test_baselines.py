"""Promises of the baselines beside their references: limits, perturbations, refusals."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bilora_diffusion.adapters import Factors
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, create, names
from bilora_diffusion.methods.efm_lora import perturbations
from bilora_diffusion.methods.options import LookSAMOptions
from tests.methods.runs import SPEC, STEPS, Run, assert_same_layers, batch, naive
from tests.references import methods as reference


@pytest.mark.parametrize("name", ["oBAR", "nBAR"])
def test_bar_follows_a_warm_up_although_the_optimizers_groups_are_replaced(name):
    """accelerate's `prepare` and a resume put new dictionaries into `param_groups`."""
    run = Run(f"lora-{name}".lower(), MethodOptions(bar_alpha=2.0), "SGD", 0.1)
    net, schedule = naive(run), LambdaLR(run.optimizer, lambda k: min(1.0, k / 25))
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for k in range(STEPS):
        for layer_rules in net.rules:
            layer_rules["A"].lr = layer_rules["B"].lr = 0.1 * min(1.0, k / 25)
        reference.bar(net, *batch(k), name, 2.0)
        run.train(1, first=k)
        schedule.step()
    assert_same_layers(run, net)


@pytest.mark.parametrize("name", [name for name in names() if name not in ("lora", "full")])
def test_a_layer_without_a_gradient_is_left_alone_and_the_others_go_on(name):
    """The output does not reach the last layer (SDXL's text encoders have such a one)."""
    options = MethodOptions(rho=0.3, bar_alpha=2.0, num_steps=STEPS)
    run = Run(name, options, "AdamW", 0.05, 0.01)
    smaller_run = Run(name, options, "AdamW", 0.05, 0.01, replace(SPEC, target_modules=("0",)))
    for key, tensor in smaller_run.method.tensors().items():
        tensor.copy_(run.method.tensors()[key])
    last = {key: v.clone() for key, v in run.primary().items() if key.startswith("2.")}
    losses = []
    for compared_run in (run, smaller_run):

        def backward(k, first=compared_run.model[:2]):
            loss = (first(batch(0)[0]) - 1).square().mean()
            loss.backward()
            return loss.detach()

        losses.append(compared_run.train(backward=backward))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(run.primary()[key], value) for key, value in last.items())


@pytest.mark.parametrize(
    ("name", "number"),
    [("lora-sam", 2), ("flat-lora", 1), ("lora-msam", 1), ("efm-lora", 1), ("lora-looksam", 2)],
)
def test_a_failing_pass_leaves_no_perturbation(name, number):
    run = Run(name, MethodOptions(rho=0.5, num_steps=STEPS), "AdamW", 0.01)
    run.train(5)  # the next is a look of LookSAM
    before = copy.deepcopy(run.model.state_dict())
    run.passes = 0

    def fails(k):
        if run.passes == number - 1:
            raise RuntimeError("boom")
        return run.backward(k)

    with pytest.raises(RuntimeError, match="boom"):
        run.train(1, backward=fails)
    after = run.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_full_fine_tuning_needs_float32():
    with pytest.raises(UserError, match="float32"):
        create("full").setup([Target("unet", nn.Linear(3, 3).bfloat16(), SPEC, 1e-3)])


def test_a_schedule_without_a_length_is_refused():
    run = Run("flat-lora")
    with pytest.raises(UserError, match="num_steps"):
        run.train(1)
    assert run.method.depends_on_length
    assert not any(create(name).depends_on_length for name in ("bilora", "lora-obar"))


def test_looking_at_every_step_is_lora_sam_and_looks_are_logged():
    def look(interval):
        options = MethodOptions(rho=0.2, settings=LookSAMOptions(looksam_k=interval))
        return Run("lora-looksam", options, "AdamW", 5e-3)

    sam, run = Run("lora-sam", MethodOptions(rho=0.2), "AdamW", 5e-3), look(2)
    assert sam.method.metrics() == {}
    torch.testing.assert_close(look(1).train(), sam.train(), rtol=1e-10, atol=1e-10)
    for k in range(4):
        run.train(1, first=k)
        assert list(run.method.metrics()) == ([] if k % 2 else ["sharpness"])
        assert all(value > 0 for value in run.method.metrics().values())


MOMENTA: dict[str, Any] = {
    "momentum_buffer": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "exp_avg": lambda groups: Prodigy([{**group, "lr": 1.0} for group in groups]),
}


@pytest.mark.parametrize("name", MOMENTA)
def test_msam_moves_by_rho_against_the_momentum_of_any_optimizer(name):
    run = Run("lora-msam", MethodOptions(rho=0.3), MOMENTA[name])
    weights, momenta, before = run.method.clip_parameters(), [], []

    def backward(k):
        steps = [w.detach() - b for w, b in zip(weights, before, strict=True)]
        norm = torch.cat([v.flatten() for v in momenta]).norm() if k else 1.0
        for step, v in zip(steps, momenta, strict=True):
            torch.testing.assert_close(step, -0.3 * v / norm if k else torch.zeros_like(step))
        return run.backward(k)

    for k in range(3):
        before[:] = [weight.detach().clone() for weight in weights]
        momenta[:] = [run.optimizer.state[weight].get(name, weight) for weight in weights]
        run.train(1, first=k, backward=backward)


def test_msam_refuses_an_optimizer_without_momentum():
    with pytest.raises(UserError, match=r"SGD as it is set keeps none.*momentum=0\.9"):
        Run("lora-msam", kind="SGD")
    run = Run("lora-msam")
    codes = {"state1": torch.zeros(3)}  # of 8 bits
    run.optimizer.state[run.method.clip_parameters()[0]] = codes
    with pytest.raises(UserError, match="none that can be read, only state1; use AdamW"):
        run.train(1)


def test_efm_lora_moves_layers_of_any_shape_and_none_without_a_gradient():
    torch.manual_seed(0)
    shapes = [(3, 7, 5, 2.0), (3, 7, 5, 2.0), (2, 4, 9, 0.5), (4, 3, 3, 1.0), (3, 7, 5, 2.0)]

    def random_factors(r, n, m, s):
        return Factors("", torch.randn(r, n).double(), torch.randn(m, r).double(), s)

    layers, gradients = ([random_factors(*shape) for shape in shapes] for _ in range(2))
    layers[1].B.zero_()  # as at the start of a run
    for gradient in gradients[3][1:3]:
        gradient.zero_()
    *nonzero, zero, missing = perturbations(layers, [*gradients[:-1], None], 0.3)
    assert missing is None
    assert not zero.any()
    for f, g, E in zip(layers, gradients, nonzero, strict=False):
        layer = reference.Layer(torch.zeros(0), torch.zeros(0), f.A, f.B, f.scale)
        expected = reference.equations_12_to_15(layer, {"A": g.A, "B": g.B}, 0.3)
        torch.testing.assert_close(E, expected, rtol=1e-8, atol=1e-10)
