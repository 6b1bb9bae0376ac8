"""A method is not LoRA under any schedule of the learning rate, from the scripts' own defaults on.

A warm-up's first step has rate 0. Twice a method took its scale from that step and was LoRA for the
rest of the run.
"""

import functools
import math

import pytest
import torch

from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.config.options import LR_SCHEDULERS
from bilora_diffusion.core.values import AUTO, SAMPLE
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.methods import create, names
from bilora_diffusion.text.config import TextConfig
from tests.contract.harness import Run
from tests.text.text_builders import material

STEPS, WARMUP = 6, 2
SCHEDULES = {
    "the script's own": [],
    **{
        name: ["--lr_scheduler", name, "--lr_warmup_steps", str(WARMUP)]
        for name in LR_SCHEDULERS
        if name != "constant"
    },
}
VARIANTS = [(name, []) for name in names() if name != "lora" and not create(name).exports_weights]
VARIANTS += [
    ("bilora", ["--rho", AUTO]),
    ("bilora", ["--rho", "0.05", "--auxiliaries", SAMPLE]),
    ("bilora", ["--rho", AUTO, "--auxiliaries", SAMPLE]),
]
LEAST_DIFFERENCE = 1e-6  # of what LoRA learns; in float64 rounding is some 1e-15


def resolve(script, method, options, schedule):
    """The configuration of a script's command line with nothing else than these options."""
    argv = ["--method", method, *options, *SCHEDULES[schedule]]
    if script == "image":
        return DreamBoothConfig.resolve(["--dataset", "mini", *argv])
    rows = material("causal")
    model = ["--model_name_or_path", str(rows["model_name_or_path"]), "--template", "plain"]
    return TextConfig.resolve([*model, "--train_file", str(rows["train_file"]), *argv])


def train(script, method, options, schedule):
    """Primary before and after, and the auxiliary's norm in each step where there is one."""
    config = resolve(script, method, options, schedule)
    run = Run(method, "default", "mlp", dtype=torch.float64, config=config, steps=STEPS)
    start = primary(run)
    norms = []
    for _ in range(STEPS):
        run.train(1)
        norms.append(run.method.metrics().get("auxiliary_norm"))
    return start, primary(run), norms


def primary(run):
    tensors = {key: t for key, t in run.tensors().items() if f"/{PRIMARY}/" in key}
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


@functools.cache
def train_lora(script, schedule):
    """`train` for LoRA, once for all methods that are compared with it."""
    return train(script, "lora", [], schedule)


def cases():
    """Each script's own schedule, and on images every other one; the rest is for the matrix."""
    for script in ("image", "text"):
        for schedule in SCHEDULES:
            if schedule == "the script's own":
                marks = []
            elif script == "text":
                marks = [pytest.mark.matrix]
            else:
                marks = [] if schedule == "constant_with_warmup" else [pytest.mark.slow]
            yield pytest.param(script, schedule, marks=marks)


@pytest.mark.parametrize(("script", "schedule"), cases())
@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
def test_the_method_differs_from_lora(script, method, options, schedule):
    start, learned, _ = train_lora(script, schedule)
    same_start, differently_learned, norms = train(script, method, options, schedule)
    assert torch.equal(start, same_start)
    difference = float((differently_learned - learned).norm() / (learned - start).norm())
    assert difference > LEAST_DIFFERENCE
    assert math.isfinite(difference)
    if method == "bilora":
        assert max(norms) > 0
