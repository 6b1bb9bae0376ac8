"""Every method differs from LoRA under every learning-rate schedule.

The first step of a warm-up has rate 0. Twice, a method took its scale from this step and was plain
LoRA for the rest of the run.
"""

import functools
import math

import pytest
import torch

from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.config.options import LR_SCHEDULERS
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.methods import create, names
from bilora_diffusion.text.config import TextConfig
from tests.contract.harness import Run
from tests.text.text_builders import material

STEPS = 6
SCHEDULES = {"the script's own": ""}
for schedule_name in LR_SCHEDULERS:
    if schedule_name != "constant":
        SCHEDULES[schedule_name] = f"--lr_scheduler {schedule_name} --lr_warmup_steps 2"
METHODS = []
for method_name in names():
    if method_name != "lora" and not create(method_name).exports_weights:
        METHODS.append(method_name)
LEAST_DIFFERENCE = 1e-6
"""Relative to LoRA's own change of the primary; in float64, rounding is about 1e-15."""


def resolve(script, method, schedule):
    """Return a script's configuration for a method and a schedule, with defaults otherwise."""
    flags = f"--method {method} {SCHEDULES[schedule]}"
    if script == "image":
        return DreamBoothConfig.resolve(f"--dataset mini {flags}".split())
    rows = material("causal")
    model = rows["model_name_or_path"]
    data = f"--model_name_or_path {model} --template plain --train_file {rows['train_file']}"
    return TextConfig.resolve(f"{data} {flags}".split())


def train(script, method, schedule):
    """Return the primary before and after training, and the auxiliary's norm (or None) per step."""
    config = resolve(script, method, schedule)
    run = Run(method, "default", "mlp", dtype=torch.float64, config=config, steps=STEPS)
    start = primary(run)
    norms = []
    for _ in range(STEPS):
        run.train(1)
        norms.append(run.method.metrics().get("auxiliary_norm"))
    return start, primary(run), norms


def primary(run):
    """Return all values of the primary as one vector."""
    tensors = run.tensors()
    keys = sorted(key for key in tensors if f"/{PRIMARY}/" in key)
    return torch.cat([tensors[key].flatten() for key in keys])


@functools.cache
def train_lora(script, schedule):
    """Return the cached result of `train` for LoRA."""
    return train(script, "lora", schedule)


def cases():
    """Yield each script with each schedule; some get the mark `slow` or `matrix`."""
    for script in ("image", "text"):
        for schedule in SCHEDULES:
            if schedule == "the script's own":
                marks = ()
            elif script == "text":
                marks = pytest.mark.matrix
            elif schedule == "constant_with_warmup":
                marks = ()
            else:
                marks = pytest.mark.slow
            yield pytest.param(script, schedule, marks=marks)


@pytest.mark.parametrize(("script", "schedule"), cases())
@pytest.mark.parametrize("method", METHODS)
def test_a_method_differs_from_lora(script, method, schedule):
    start, end, _ = train_lora(script, schedule)
    method_start, method_end, norms = train(script, method, schedule)
    assert torch.equal(start, method_start)
    difference = float((method_end - end).norm() / (end - start).norm())
    assert LEAST_DIFFERENCE < difference < math.inf
    if method == "bilora":
        assert max(norms) > 0
