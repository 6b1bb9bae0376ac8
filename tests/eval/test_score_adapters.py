"""Adapters and whole models in a pipeline: digests, base models, loading, removal, rounding."""

import copy
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters.quantize import UNQUANTIZED_MODULES, find_layers
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.conversion import convert
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed, generate
from eval.clip_scores.perturbation import Perturbation, round_rows
from eval.clip_scores.settings import base_model
from eval.load import applied
from eval.sources import find
from eval.subjects import single
from tests.export.export_models import rewrite, write_lora
from tests.scripts.runs import train_once

PROMPT = "a ToK icon of a Owl, in the style of ToK"
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("mini", dtype=torch.float32)


@pytest.fixture(scope="module")
def files(pipeline, tmp_path_factory):
    """Write LoRA files in the folders "unet" and "text" (with both text encoders)."""
    root = tmp_path_factory.mktemp("files")
    write_lora(root / "unet", pipeline, kohya=True)
    components = ("unet", "text_encoder", "text_encoder_2")
    write_lora(root / "text", pipeline, size=1.0, components=components)
    return root


def test_the_digest_depends_only_on_the_weights_and_their_scale(files, tmp_path):
    source = files / "unet" / FILE
    key = next(iter(load_file(source)))

    def rescale(_, metadata):
        described = json.loads(metadata["lora_adapter_metadata"])
        described["unet.lora_alpha"] *= 2
        metadata["lora_adapter_metadata"] = json.dumps(described)

    def altered(change):
        return find(str(rewrite(source, tmp_path / "altered.safetensors", change))).digest

    digest = find(str(source)).digest
    assert altered(lambda tensors, metadata: metadata.pop("modelspec.date")) == digest
    assert altered(rescale) != digest
    assert altered(lambda tensors, _: tensors[key][0].add_(1e-6)) != digest
    # The same values in half precision
    assert altered(lambda tensors, _: tensors.update({key: tensors[key].half()})) != digest


def test_all_adapters_must_have_the_same_base_model(files, tmp_path):
    weights = files / "unet" / FILE
    foreign_file, unnamed_file = tmp_path / "o.safetensors", tmp_path / "s.safetensors"
    rewrite(weights, foreign_file, lambda _, m: m.update({"ss_sd_model_name": "owner/other"}))
    rewrite(weights, unnamed_file, lambda _, m: m.pop("bilora.method"))
    base, mini, foreign, unnamed = single(
        ["base", str(weights), str(foreign_file), str(unnamed_file)]
    )
    assert unnamed.base_model is None
    assert base_model([base, mini, unnamed], None) == "mini"
    assert base_model([base, unnamed], "owner/x") == "owner/x"
    assert base_model([foreign], str(tmp_path)) == str(tmp_path)  # a local copy
    for subjects, base_name, sentence in (
        ([mini, foreign], None, "mini.*owner/other"),
        ([base, unnamed], None, "--base_model"),
        ([foreign], "mini", "owner/other.*mini"),
    ):
        with pytest.raises(UserError, match=sentence):
            base_model(subjects, base_name)


def sampled_pixels(pipeline):
    """Return the pixels of one image sampled in two steps, (64, 64, 3)."""
    (image,) = generate(pipeline, [PROMPT], [3], size=64, steps=2, guidance_scale=4.0)
    return np.asarray(image).astype(int)


def embedded_prompt(pipeline):
    return embed(pipeline, [PROMPT])["sequence"]


@contextmanager
def unchanged(pipeline):
    """Check that the block leaves the pipeline unchanged; yields its pixels and embedded prompt."""
    models = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pixels, prompt = sampled_pixels(pipeline), embedded_prompt(pipeline)
    yield pixels, prompt
    assert (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) == models
    assert not any(pipeline.get_list_adapters().values())
    state_after = pipeline.unet.state_dict()
    assert state_after.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(state_after[name], tensor)
    assert torch.equal(embedded_prompt(pipeline), prompt)
    assert np.array_equal(sampled_pixels(pipeline), pixels)


@pytest.mark.parametrize("name", ["unet", "text"])
def test_an_adapter_acts_as_in_diffusers_and_the_base_is_restored_even_after_an_error(
    name, pipeline, files
):
    subject = find(str(files / name))
    reference = load_pipeline("mini", dtype=torch.float32)
    reference.load_lora_weights(str(files / name), weight_name=FILE)
    with unchanged(pipeline) as (base_pixels, base_prompt):
        with applied(pipeline, subject):
            pixels = sampled_pixels(pipeline)
            assert not np.array_equal(pixels, base_pixels)
            assert np.array_equal(pixels, sampled_pixels(reference))
            adapts_text = not torch.equal(embedded_prompt(pipeline), base_prompt)
            assert adapts_text == (name == "text")
            assert not any(parameter.requires_grad for parameter in pipeline.unet.parameters())
            assert not pipeline.unet.training
        with applied(pipeline, subject, 0.0):
            assert np.array_equal(sampled_pixels(pipeline), base_pixels)
        with pytest.raises(ZeroDivisionError), applied(pipeline, subject):
            raise ZeroDivisionError


@pytest.mark.slow
def test_a_whole_model_acts_as_trained_and_the_base_is_restored_even_after_an_error(pipeline):
    run = train_once("full", method="full")
    subject = find(str(run))
    trained = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    perturbation = Perturbation(pipeline, "int8")
    with unchanged(pipeline) as (base_pixels, base_prompt):
        with applied(pipeline, subject):
            for name, parameter in pipeline.unet.named_parameters():
                assert torch.equal(parameter, trained[name])
                assert not parameter.requires_grad
            assert not pipeline.unet.training
            assert not np.array_equal(sampled_pixels(pipeline), base_pixels)
            assert torch.equal(embedded_prompt(pipeline), base_prompt)
            with perturbation.acting(pipeline):
                for name, weight in linear_weights(pipeline.unet).items():
                    assert torch.equal(weight, round_rows(trained[f"{name}.weight"], 8))
            assert torch.equal(pipeline.unet.conv_in.weight, trained["conv_in.weight"])
        with pytest.raises(ZeroDivisionError), applied(pipeline, subject):
            raise ZeroDivisionError
        with pytest.raises(UserError, match="no scale"), applied(pipeline, subject, 0.5):
            pass


@torch.no_grad()
def predicted(unet):
    """Return the UNet's prediction for random inputs."""
    config, generator = unet.config, torch.Generator().manual_seed(0)
    sample = torch.randn(1, config.in_channels, 8, 8, generator=generator)
    prompt = torch.randn(1, 7, config.cross_attention_dim, generator=generator)
    # The class embedding consists of the pooled prompt and SDXL's six embedded sizes and crops.
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {
        "text_embeds": torch.randn(1, width, generator=generator),
        "time_ids": torch.ones(1, 6),
    }
    return unet(sample, 500, prompt, added_cond_kwargs=added).sample


@pytest.fixture(scope="module")
def locon(pipeline, tmp_path_factory):
    """Write a file in kohya's format; return it and a UNet with the adapter merged.

    Alpha is 4 in all layers. The rank is 2 for queries and convolutions, and 4 for other layers.
    Each adapted layer of the UNet has the weight
    W' = m (W + alpha / rank B A) / ||W + alpha / rank B A||, where m is the layer's magnitude
    (DoRA) and the norm is taken over each output's row.
    """
    generator = torch.Generator().manual_seed(0)
    alpha = 4.0
    tensors = {}
    reference = copy.deepcopy(pipeline.unet)
    for path, module in reference.named_modules():
        if not path.endswith(("to_q", "to_k", "to_v", "conv1")):
            continue
        rank = 2 if path.endswith(("to_q", "conv1")) else 4
        weight = module.weight.data  # (out, in), or (out, in, height, width)
        outputs, inputs, *kernel = weight.shape
        trailing = [1] * len(kernel)
        A = torch.randn(rank, inputs, *kernel, generator=generator) / 8
        B = torch.randn(outputs, rank, *trailing, generator=generator) / 8
        magnitude = (torch.rand(outputs, generator=generator) + 0.5).reshape(-1, 1, *trailing)
        weight += alpha / rank * (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)
        weight *= magnitude / weight.flatten(1).norm(dim=1).reshape(magnitude.shape)
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = A
        tensors[f"{name}.lora_up.weight"] = B
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        tensors[f"{name}.dora_scale"] = magnitude
    file = tmp_path_factory.mktemp("locon") / "locon.safetensors"
    save_file(tensors, file)
    return file, reference


def test_a_kohya_file_acts_with_the_rank_alpha_and_magnitude_of_each_layer(pipeline, locon):
    file, reference = locon
    base, expected = predicted(pipeline.unet), predicted(reference)
    predictions = []
    for source in (file, convert(file, "diffusers")):
        with applied(pipeline, find(str(source))):
            prediction = predicted(pipeline.unet)
        assert (prediction - expected).norm() < 1e-5 * (expected - base).norm()
        predictions.append(prediction)
    assert torch.equal(*predictions)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("to_q", "to_z", r"no layer for 1 of.*unet.*to_z"),
        ("lora_A", "lora_A.auxiliary", "more than one adapter.*auxiliary"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(old, new, message, pipeline, files, tmp_path):
    def change(tensors, _):
        """Rename the tensors of one layer, or add the tensors of a second adapter to it."""
        key = next(key for key in tensors if "to_q.lora_A" in key)
        layer = key.partition("to_q")[0]
        for name in list(tensors):
            if name.startswith(f"{layer}to_q") and old in name:
                tensor = tensors[name] if old == "lora_A" else tensors.pop(name)
                tensors[name.replace(old, new)] = tensor.clone()

    file = rewrite(files / "unet" / FILE, tmp_path / "bad.safetensors", change)
    with pytest.raises(UserError, match=message), applied(pipeline, find(str(file))):
        pass
    assert not any(pipeline.get_list_adapters().values())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_each_row_is_rounded_to_its_nearest_representable_values(bits):
    torch.manual_seed(0)
    weight = torch.randn(5, 40) * torch.tensor([1.0, 10.0, 1e-3, 0.0, 1e30])[:, None]
    largest = 2 ** (bits - 1) - 1
    expected = torch.empty(weight.shape, dtype=torch.float64)
    for i, row in enumerate(weight.double()):
        scale = float(row.abs().max()) / largest
        values = [number * scale for number in range(-largest, largest + 1)]
        for j, entry in enumerate(row.tolist()):
            expected[i, j] = min(values, key=lambda value: abs(value - entry))
    rounded = round_rows(weight, bits)
    assert torch.allclose(rounded.double(), expected, rtol=1e-5, atol=0)
    # The largest entry of a row keeps its value.
    assert torch.allclose(rounded.abs().amax(dim=1), weight.abs().amax(dim=1))


def linear_weights(unet):
    """Return copies of the perturbed layers' weights, by the path in the model without adapters."""
    weights = {}
    for path, module in unet.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) and "lora_" not in path
        if is_linear and not any(name in path for name in UNQUANTIZED_MODULES):
            weights[path.replace(".base_layer", "")] = module.weight.detach().clone()
    return weights


@pytest.mark.slow
def test_merged_weights_are_rounded_and_the_base_is_restored_even_after_an_error(
    pipeline, files, locon
):
    file, reference = locon
    merged = linear_weights(reference)
    assert len(merged) == len(find_layers(pipeline.unet))
    perturbation = Perturbation(pipeline, "int4")
    with unchanged(pipeline), applied(pipeline, find(str(file))):
        separate_prediction = predicted(pipeline.unet)
        with perturbation.acting(pipeline):
            for path, weight in linear_weights(pipeline.unet).items():
                assert torch.allclose(weight, round_rows(merged[path], 4), atol=1e-6), path
            assert not torch.equal(predicted(pipeline.unet), separate_prediction)
        # The adapter is separate from the restored weights again.
        assert torch.equal(predicted(pipeline.unet), separate_prediction)
        with pytest.raises(ZeroDivisionError), perturbation.acting(pipeline):
            raise ZeroDivisionError
        assert torch.equal(predicted(pipeline.unet), separate_prediction)
    # With almost no noise, a merged adapter acts like a separate one.
    subject = find(str(files / "unet"))
    with applied(pipeline, subject):
        prediction = predicted(pipeline.unet)
        with Perturbation(pipeline, noise=1e-9).acting(pipeline):
            assert torch.allclose(predicted(pipeline.unet), prediction, atol=1e-4)


def test_all_subjects_get_the_same_weight_noise(pipeline, files):
    perturbation = Perturbation(pipeline, noise=0.2)
    before = linear_weights(pipeline.unet)
    with perturbation.acting(pipeline):
        noise = {path: new - before[path] for path, new in linear_weights(pipeline.unet).items()}
    for path, values in noise.items():
        assert float(values.std() / before[path].std()) == pytest.approx(0.2, rel=0.05), path
    with applied(pipeline, find(str(files / "unet"))):
        with Perturbation(pipeline).acting(pipeline):  # nothing is merged
            for path, weight in linear_weights(pipeline.unet).items():
                assert torch.equal(weight, before[path])
        merged = {}
        for path, A, B, scale in adapters.factors(pipeline.unet, "default"):
            merged[path] = before[path] + scale * B @ A
        with perturbation.acting(pipeline):
            for path, weight in linear_weights(pipeline.unet).items():
                start = merged.get(path, before[path])
                assert torch.allclose(weight - start, noise[path], atol=1e-6), path
