"""Promises of the baselines that the references do not cover: perturbations, refusals, metrics."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, create, names
from tests.methods.runs import SPEC, STEPS, Run, Updates, assert_follows_reference, batch
from tests.references import methods as reference


@pytest.mark.parametrize("name", ["oBAR", "nBAR"])
def test_bar_follows_a_warm_up_after_the_optimizers_groups_were_replaced(name):
    """accelerate's `prepare` and resuming replace the dictionaries in `param_groups`."""
    run = Run(f"lora-{name}".lower(), MethodOptions(bar_alpha=2.0), "SGD", 0.1)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    step = partial(reference.bar, kind=name, strength=2.0)
    assert_follows_reference(run, step, Updates(lr=0.1), warmup=25)


@pytest.mark.parametrize("name", sorted(set(names()) - {"lora", "full"}))
def test_a_layer_without_a_gradient_stays_unchanged_and_the_others_train(name):
    """The loss does not depend on the last layer, as in SDXL's text encoders."""
    options = MethodOptions(rho=0.3, bar_alpha=2.0, num_steps=STEPS)
    run = Run(name, options, "AdamW", 0.05, 0.01)
    smaller_run = Run(name, options, "AdamW", 0.05, 0.01, replace(SPEC, target_modules=("0",)))
    for key, tensor in smaller_run.method.tensors().items():
        # Both runs start with the same values in the first layer.
        tensor.copy_(run.method.tensors()[key])
    initial_primary = run.primary()

    def train_first_layer(run):
        x, _ = batch(0)

        def backward(k):
            loss = (run.model[:2](x) - 1).square().mean()
            loss.backward()
            return loss.detach()

        return run.train(backward=backward)

    losses = train_first_layer(run)
    assert train_first_layer(smaller_run) == pytest.approx(losses, rel=1e-9)
    assert losses[-1] < losses[0]
    for key, tensor in run.primary().items():
        if key.startswith("2."):
            assert torch.equal(tensor, initial_primary[key])


@pytest.mark.parametrize(("name", "number"), [("lora-sam", 2), ("flat-lora", 1)])
def test_a_failing_pass_leaves_no_perturbation(name, number):
    run = Run(name, MethodOptions(rho=0.5, num_steps=STEPS), "AdamW", 0.01)
    run.train(5)
    state_before = copy.deepcopy(run.model.state_dict())
    run.passes = 0

    def fail_in_pass(k):
        if run.passes == number - 1:
            raise RuntimeError("boom")
        return run.backward(k)

    with pytest.raises(RuntimeError, match="boom"):
        run.train(1, backward=fail_in_pass)
    for key, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, state_before[key])


def test_full_fine_tuning_needs_float32():
    with pytest.raises(UserError, match="float32"):
        create("full").setup([Target("unet", nn.Linear(3, 3).bfloat16(), SPEC, 1e-3)])


def test_a_schedule_without_a_number_of_steps_is_refused():
    run = Run("flat-lora")
    with pytest.raises(UserError, match="num_steps"):
        run.train(1)
    assert run.method.depends_on_length
    assert not any(create(name).depends_on_length for name in ("bilora", "lora-obar"))


def test_lora_sam_logs_the_loss_increase_at_the_perturbed_weights():
    run = Run("lora-sam", MethodOptions(rho=0.2))
    assert run.method.metrics() == {}
    run.train(1)
    assert run.method.metrics()["sharpness"] > 0
