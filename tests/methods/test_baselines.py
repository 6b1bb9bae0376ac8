"""Promises of the baselines beside their references: limits, perturbations, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, create, names
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
    [("lora-sam", 2), ("flat-lora", 1)],
)
def test_a_failing_pass_leaves_no_perturbation(name, number):
    run = Run(name, MethodOptions(rho=0.5, num_steps=STEPS), "AdamW", 0.01)
    run.train(5)
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


def test_lora_sam_logs_by_how_much_the_loss_rises_uphill():
    run = Run("lora-sam", MethodOptions(rho=0.2))
    assert run.method.metrics() == {}
    run.train(1)
    assert run.method.metrics()["sharpness"] > 0
