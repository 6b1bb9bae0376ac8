"""`--sampling_lora` and `--validation_model`: the images equal those of diffusers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, SAMPLING, AdapterSpec
from bilora_diffusion.config.lora_sources import find_lora_source
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.families.base import Unconditional
from bilora_diffusion.image.first_values import read_start
from bilora_diffusion.image.frozen_loras import read_frozen
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed, embed_negative, generate
from bilora_diffusion.image.validation_model import base_tensors, load_validation_model
from bilora_diffusion.methods import Target, create
from bilora_diffusion.mini import four_steps_file
from tests.image.image_folders import difference
from tests.image.test_frozen_loras import KINDS, STRENGTH, pipeline_of, random_file

PROMPTS = ["a TOK icon of a rabbit"]
OPTIONS: Any = {"size": 64, "steps": 2}


def merge(pipeline, file, strength):
    """Add the layers of a LoRA file to the weights of a pipeline's denoiser."""
    denoiser = family_of(pipeline).model(pipeline)
    tensors = load_file(file)
    for key, A in tensors.items():
        if ".lora_A" not in key:
            continue
        _, _, path = key.replace(".lora_A.weight", "").partition(".")
        B = tensors[key.replace("lora_A", "lora_B")]
        denoiser.get_submodule(path).weight.data += strength * B @ A


@pytest.mark.parametrize("kind", KINDS)
def test_images_with_a_sampling_lora_equal_those_of_diffusers(kind, tmp_path):
    """Bi-LoRA's primary starts from one file; the other file acts only while sampling."""
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    model = family.model(pipeline)
    first = random_file(tmp_path / "first.safetensors", pipeline, rank=4, seed=1)
    second = random_file(tmp_path / "second.safetensors", pipeline, rank=3, seed=2)
    reference = copy.deepcopy(pipeline)
    reference.load_lora_weights(str(first), adapter_name="first")
    images_without = generate(reference, PROMPTS, [3], **OPTIONS)
    reference.load_lora_weights(str(second), adapter_name="second")
    reference.set_adapters(["first", "second"], [0.8, STRENGTH])
    expected = generate(reference, PROMPTS, [3], **OPTIONS)
    assert difference(expected, images_without) > 0
    # With guidance from the base model, the base model includes the second file.
    merged = copy.deepcopy(pipeline)
    merge(merged, second, STRENGTH)
    merged.load_lora_weights(str(first), adapter_name="first")
    guided: Any = {**OPTIONS, "guidance_scale": 4.0, "guidance_from": "base"}
    is_guided = family.unconditional is not Unconditional.NONE

    spec = AdapterSpec(rank=4, alpha=4, target_modules=tuple(adapters.adaptable(model)))
    target = Target(family.denoiser, model, spec, 0.1)
    start = read_start(find_lora_source("init_from", str(first)), pipeline, [target], "base")
    source = find_lora_source("sampling_lora", str(second), STRENGTH)
    models = {family.denoiser: model}
    frozen = read_frozen(source, SAMPLING, pipeline, models, "base")[family.denoiser]
    method = create("bilora")
    method.setup(
        [Target(family.denoiser, model, spec, 0.1, frozen=(frozen,), start=start[family.denoiser])]
    )
    assert adapters.active(model) == ("default", AUXILIARY)  # not active in training
    model.eval()
    with method.evaluating():
        assert difference(generate(pipeline, PROMPTS, [3], **OPTIONS), images_without) <= 1
        with adapters.joined_by(model, SAMPLING):
            with adapters.scaled([layer for _, layer in adapters.layers(model)], 0.8):
                images = generate(pipeline, PROMPTS, [3], **OPTIONS)
            if is_guided:
                by_base = generate(pipeline, PROMPTS, [3], **guided)
                assert difference(by_base, generate(merged, PROMPTS, [3], **guided)) <= 1
    assert difference(images, expected) <= 1
    assert not any(p.requires_grad for p in adapters.parameters(model, SAMPLING))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """Save a model of the miniature's shape with other weights and another scheduler."""
    folder = tmp_path_factory.mktemp("turbo") / "mini-turbo"
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    for number, weight in enumerate(pipeline.unet.parameters()):
        random = torch.Generator().manual_seed(number)
        weight.data *= 1 + 0.05 * torch.randn(weight.shape, generator=random)
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing"}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    del pipeline.origin
    pipeline.save_pretrained(folder)
    return folder


def config_of(*words):
    return resolve(["--dataset", "mini", "--output_dir", "out", *map(str, words)])


def test_a_validation_model_has_adapters_and_its_own_scheduler_and_keeps_the_base_intact(
    turbo, tmp_path
):
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    file = random_file(tmp_path / "file.safetensors", pipeline, rank=2, seed=3)
    model = load_validation_model(config_of("--validation_model", turbo), pipeline, torch.float32)
    assert model is not None
    pipeline.load_lora_weights(str(file), adapter_name="default")
    before = {name: tensor.clone() for name, tensor in base_tensors(pipeline.unet).items()}
    usual = generate(pipeline, PROMPTS, [3], **OPTIONS)
    reference: Any = load_pipeline(str(turbo), dtype=torch.float32)
    reference.load_lora_weights(str(file))
    # The sampling pipeline has no text encoders, since a run deletes them.
    embeddings = embed(pipeline, PROMPTS), embed_negative(pipeline, 1)
    with model.acting():
        images = generate(model.pipeline, PROMPTS, [3], embeddings=embeddings, **OPTIONS)
    assert difference(images, generate(reference, PROMPTS, [3], **OPTIONS)) <= 1
    assert difference(images, usual) > 4
    for name, tensor in base_tensors(pipeline.unet).items():
        assert torch.equal(tensor, before[name])
    assert difference(generate(pipeline, PROMPTS, [3], **OPTIONS), usual) == 0


def test_a_validation_model_of_another_shape_or_kind_is_refused(turbo, tmp_path):
    with pytest.raises(UserError, match=r"is a StableDiffusion3Pipeline.*StableDiffusionXLPip"):
        config_of("--validation_model", "mini-flow")
    with pytest.raises(UserError, match="--validation_model"):
        config_of("--validation_model", tmp_path / "nothing")
    for words in ("--quantize nf4", "--init_lora_weights pissa", "--method full"):
        with pytest.raises(UserError, match="--validation_model"):
            config_of("--validation_model", turbo, *words.split())
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    pipeline.unet.conv_in = torch.nn.Conv2d(4, 8, 3)
    with pytest.raises(UserError, match=r"differs in shape from the base model at conv_in"):
        load_validation_model(config_of("--validation_model", turbo), pipeline, torch.float32)


def test_four_steps_with_the_distilled_miniature_are_close_to_many_steps_with_guidance():
    """The settings are those of the guide.

    A file without an effect would not bring the images any closer to the guided ones.
    """
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    prompts = [f"a flat icon of a {label}" for label in ("rabbit", "lion", "sun")]
    seeds = range(len(prompts))
    guided = generate(pipeline, prompts, seeds, size=64, steps=24, guidance_scale=4.0)
    four_steps: Any = {"size": 64, "steps": 4, "guidance_scale": 1.0}
    four_steps["scheduler"] = "EulerDiscreteScheduler:timestep_spacing=trailing"
    plain = generate(pipeline, prompts, seeds, **four_steps)
    pipeline.load_lora_weights(str(four_steps_file()))
    distilled = generate(pipeline, prompts, seeds, **four_steps)

    def distance(images):
        pairs = zip(images, guided, strict=True)
        pixels = [np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in pairs]
        return np.abs(np.stack(pixels)).mean()

    assert distance(distilled) < 0.6 * distance(plain)
