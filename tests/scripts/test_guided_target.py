"""Runs with a guided target: a float64 reference of their steps, and sampling of their files."""

import copy
from typing import Any

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.image.card import write_dreambooth_card
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.loss import UNCONDITIONAL, DreamBoothModule
from bilora_diffusion.image.pipeline import load_pipeline
from eval.clip_scores import ClipScores, settings
from eval.subjects import Subject
from tests.scripts.runs import (
    ON_CPUS,
    SCRIPT,
    assert_same_run,
    column,
    difference,
    flags,
    run_python,
    train,
    two_icons,
    weights,
)

STEPS = 20
SCALE = 2.5


@pytest.mark.slow
def test_twenty_steps_match_a_float64_reference(tmp_path, monkeypatch):
    """The reference trains on the run's inputs, with only the target, AdamW and clipping."""
    frozen_inputs: list[dict[str, Any]] = []
    first_values: dict[str, torch.Tensor] = {}
    forward = DreamBoothModule.forward

    def recording_forward(self, inputs):
        frozen_inputs.append(copy.deepcopy(inputs))
        if len(frozen_inputs) == 2:  # the first call is the probe
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
        scale = 2 if "lora_B" in key else 1  # alpha / rank, which is included in the file's B
        expected = scale * parameter.detach()
        error = (stored.double() - expected).norm() / expected.norm()
        assert error < 1e-3, key


@pytest.mark.slow
def test_a_guided_target_of_scale_1_changes_nothing(tmp_path):
    icons = two_icons(tmp_path / "icons") | {"validation_dataset": "none"}
    plain = train(tmp_path / "plain", **icons)
    assert_same_run(plain, train(tmp_path / "one", **icons, guided_target=1.0))


@pytest.mark.matrix
@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """Each process computes the base model's prediction for its own rows."""
    icons = two_icons(tmp_path / "icons") | {"validation_dataset": "none", "guided_target": 2.0}
    options = {**icons, "caption_dropout": 0.5, "max_train_steps": 4}
    single = train(tmp_path / "single", **options, train_batch_size=2)
    argv = flags(tmp_path / "double", **options, train_batch_size=1)
    run_python([SCRIPT, *argv], processes=2, environment=ON_CPUS)
    # An Adam step moves weights by about the learning rate, whatever the gradient.
    assert difference(single, tmp_path / "double") < 1e-3 / 10
    assert column(single, "loss") == pytest.approx(column(tmp_path / "double", "loss"), rel=1e-4)


def test_scores_and_cards_use_no_guidance_if_all_adapters_were_trained_towards_it(tmp_path):
    def sampled_scale(*subjects, words=""):
        return settings.sampling(read(words), "mini", subjects).guidance_scale

    def read(words):
        return ClipScores.parser().read(["--prompts", "3d_icon", *words.split()])

    base = Subject("base", "base model", "base", "base")
    plain, guided = Subject("plain", "LoRA"), Subject("guided", "LoRA", guided_target=1.5)
    assert sampled_scale(plain, base) == sampled_scale(plain, guided, base) == 4
    assert sampled_scale(guided, base) == sampled_scale(guided) == 1
    assert sampled_scale(guided, words="--guidance_scale 3") == 3
    assert sampled_scale(guided, words="--guidance_from base") == 4
    assert settings.guidance_note(read(""), [guided]) == ""
    assert "guided: trained towards guidance" in settings.guidance_note(read(""), [plain, guided])
    assert settings.guidance_note(read("--guidance_scale 1"), [plain, guided]) == ""

    config = resolve(["--dataset", "linoyts/3d_icon", "--guided_target", "1.5"])
    write_dreambooth_card(config, tmp_path, {"steps": 1, "export": {}}, None)
    card = (tmp_path / "README.md").read_text()
    assert "guidance_scale=1)" in card
    assert "without a negative prompt" in card
    assert "leave_unconditional_rows" not in card
