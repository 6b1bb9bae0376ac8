"""Runs with a guided target: twenty steps against a float64 reference, and what their files say."""

import copy
from typing import Any

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.image.loss import UNCONDITIONAL, DreamBoothModule
from bilora_diffusion.image.pipeline import load_pipeline
from tests.scripts.runs import assert_same_run, train, two_icons, weights

STEPS = 20
SCALE = 2.5


@pytest.mark.slow
def test_twenty_steps_are_those_of_a_float64_reference(tmp_path, monkeypatch):
    """The frozen inputs of a run, in float64: target, AdamW, clipping and nothing else."""
    frozen_inputs: list[dict[str, Any]] = []
    first_values: dict[str, torch.Tensor] = {}
    forward = DreamBoothModule.forward

    def recording_forward(self, inputs):
        frozen_inputs.append(copy.deepcopy(inputs))
        if len(frozen_inputs) == 2:  # the first is that of the probe
            for name, value in adapters.named_parameters(self.denoiser, adapters.PRIMARY).items():
                first_values[name] = value.detach().clone()
        return forward(self, inputs)

    monkeypatch.setattr(DreamBoothModule, "forward", recording_forward)
    run = train(
        tmp_path / "run",
        **two_icons(tmp_path / "icons") | {"validation_dataset": "none"},
        method="lora",
        guided_target=SCALE,
        max_train_steps=STEPS,
        train_batch_size=2,
        learning_rate=1e-3,
    )
    assert len(frozen_inputs) == STEPS + 1

    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    base_unet = pipeline.unet.double()
    unet = copy.deepcopy(base_unet)
    targets = ("to_k", "to_q", "to_v", "to_out.0")
    adapters.inject(unet, adapters.AdapterSpec(rank=4, alpha=8, target_modules=targets))
    parameters = adapters.named_parameters(unet, adapters.PRIMARY)
    for name, parameter in parameters.items():
        parameter.data = first_values[name].double()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=1e-4)
    alphas = pipeline.scheduler.alphas_cumprod.double()

    def predict(model, inputs, conditions):
        signal = alphas[inputs["level_index"]].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * inputs["latents"] + (1 - signal).sqrt() * inputs["noise"]
        added = {"text_embeds": conditions["pooled"].double(), "time_ids": inputs["time_ids"]}
        text = conditions["sequence"].double()
        return model(noisy.double(), inputs["level_index"], text, added_cond_kwargs=added).sample

    for inputs in frozen_inputs[1:]:
        prediction = predict(unet, inputs, inputs)
        with torch.no_grad():
            unconditional = predict(base_unet, inputs, inputs[UNCONDITIONAL])
            guided_prediction = prediction - unconditional
            target = inputs["noise"] + (1 - 1 / SCALE) * guided_prediction
        (prediction - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for key, stored in weights(run).items():
        name = key.removeprefix("unet.").replace(".weight", "")
        (parameter,) = [p for n, p in parameters.items() if name in n.replace(".default", "")]
        scale = 2 if "lora_B" in key else 1  # alpha / rank, which the file has in B
        expected = scale * parameter.detach()
        error = (stored.double() - expected).norm() / expected.norm()
        assert error < 1e-3, key


@pytest.mark.slow
def test_the_weights_of_a_plain_target_are_those_of_a_run_without_the_option(tmp_path):
    """At a scale of 1 nothing is computed that a plain run does not compute."""
    icons = two_icons(tmp_path / "icons") | {"validation_dataset": "none"}
    plain = train(tmp_path / "plain", **icons)
    assert_same_run(plain, train(tmp_path / "one", **icons, guided_target=1.0))
