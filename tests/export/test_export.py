"""Exported files of small models: names, scale, metadata, and other programs that read them."""

import copy
import hashlib
import json
import math
import re
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.core.lora_names import FILE_NAME, kohya_file_name
from bilora_diffusion.export import writer
from bilora_diffusion.export.formats import diffusers_tensors, trained_layers
from bilora_diffusion.export.reader import compare
from bilora_diffusion.export.writer import save_diffusers
from bilora_diffusion.image import pipeline as image_pipeline
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from tests.export import export_models as small
from tests.export.comfy_names import SDXL_ENDINGS, SDXL_KEYS

KOHYA_FILE = "icons.safetensors"  # of the fixture `folder`


@pytest.fixture(scope="module")
def plain_unet():
    return small.make_unet()


@pytest.mark.slow
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 12),
    alpha=st.floats(0.1, 64, allow_nan=False).map(lambda value: round(value, 3)),
    dora=st.booleans(),
    double=st.booleans(),
)
def test_the_exported_change_is_scale_times_b_a(
    plain_unet, tmp_path_factory, rank, alpha, dora, double
):
    model = copy.deepcopy(plain_unet).to(torch.float64 if double else torch.float32)
    spec = AdapterSpec(rank=rank, alpha=alpha, use_dora=dora, target_modules=("to_q", "conv1"))
    small.add_adapters(model, spec, seed=rank)
    folder = tmp_path_factory.mktemp("property")
    report = save_diffusers(folder, {"unet": model}, base_model="base", kohya=True)
    assert report["max_relative_difference"] < 3e-7
    assert report["kohya_max_relative_difference"] < 3e-7
    # Multiplication by a power of two is exact.
    if not double and math.frexp(alpha / rank)[0] == 0.5:
        assert report["max_abs_difference"] == 0
    tensors = load_file(folder / FILE_NAME)
    for name, layer in adapters.layers(model, PRIMARY):
        A = tensors[f"unet.{name}.lora_A.weight"].flatten(1)
        B = tensors[f"unet.{name}.lora_B.weight"].flatten(1)
        # PEFT's own s * B @ A, in fp32
        expected = cast(Any, layer).get_delta_weight(PRIMARY).flatten(1).float()
        torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)


def sampled_pixels(pipeline):
    (image,) = generate(pipeline, ["a fox"], [0], size=64, steps=2, guidance_scale=3.0)
    return np.asarray(image, dtype=int)


def largest_difference(pixels, expected):
    return np.abs(pixels - expected).max()


def add_small_adapters(model, spec):
    """Add both adapters, with values so small that images keep their structure."""
    small.add_adapters(model, spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.mul_(0.05)
        if spec.use_dora:
            # DoRA's initial magnitudes: the norms of the weight's rows.
            for _, layer in adapters.layers(model, PRIMARY):
                norms = adapters.base_weight(layer).flatten(1).norm(dim=1)
                magnitude = cast(Any, layer).lora_magnitude_vector[PRIMARY].weight
                magnitude.copy_(norms.view(magnitude.shape))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "dora"), [(6, False), (8, True)])
def test_images_from_the_file_equal_those_from_memory_and_comfyui_knows_every_key(
    alpha, dora, tmp_path
):
    trained, other_pipeline = (load_pipeline("mini", dtype=torch.float32) for _ in range(2))
    spec = AdapterSpec(rank=4, alpha=alpha, use_dora=dora, target_modules="all-linear")
    places = image_pipeline.select_layers(["all"], family_of(trained), trained.unet)
    models = {
        "unet": add_small_adapters(trained.unet, replace(spec, target_modules=places)),
        "text_encoder": add_small_adapters(trained.text_encoder, spec),
        "text_encoder_2": add_small_adapters(trained.text_encoder_2, spec),
    }
    small.export_all(tmp_path / "dog", models)
    with adapters.only(nn.ModuleDict(models), [PRIMARY]):
        expected = sampled_pixels(trained)
    assert largest_difference(sampled_pixels(other_pipeline), expected) > 12  # of 255
    # Here the auxiliary is active too.
    assert largest_difference(sampled_pixels(trained), expected) > 2
    other_pipeline.load_lora_weights(tmp_path / "dog")  # diffusers loads its own of the two files
    assert largest_difference(sampled_pixels(other_pipeline), expected) <= 1
    if not dora:  # diffusers drops dora_scale from kohya files
        other_pipeline.unload_lora_weights()
        other_pipeline.load_lora_weights(tmp_path / "dog", weight_name="dog.safetensors")
        assert largest_difference(sampled_pixels(other_pipeline), expected) <= 1

    keys = list(load_file(tmp_path / "dog" / "dog.safetensors"))
    endings = "|".join(re.escape(ending) for ending in SDXL_ENDINGS)
    comfyui_key = re.compile(f"({'|'.join(SDXL_KEYS)})({endings})")
    for key in keys:
        assert comfyui_key.fullmatch(key)
    assert any(key.endswith(".dora_scale") for key in keys) == dora


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/icons/", "icons.safetensors"),
        ("/", "lora.safetensors"),
        # The Hub's upload skips names that start with a dot.
        ("runs/.hidden", "hidden.safetensors"),
        ("a<lora:b:1>, c", "a_lora_b_1__ c.safetensors"),
        ("my_pytorch_lora_weights", "my_pytorch_lora_weights-kohya.safetensors"),
        ("\udcff", "_.safetensors"),
        ("ü" * 120, f"{'ü' * 90}.safetensors"),  # file systems allow 255 bytes
    ],
)
def test_the_kohya_file_is_named_after_the_run(folder, name):
    assert kohya_file_name(folder) == name


def test_both_files_have_the_expected_metadata(models, folder):
    plain = small.read_metadata(folder / FILE_NAME)
    kohya = small.read_metadata(folder / KOHYA_FILE)
    expected = {
        "format": "pt",
        "ss_sd_model_name": "some/base",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_output_name": "icons",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "icons",
        "bilora.original_alpha": '{"unet": 6.0, "text_encoder": 6.0, "text_encoder_2": 6.0}',
        **small.FACTS,
    }
    # The model is too small to be labeled as SDXL.
    assert kohya == expected | {"sshs_model_hash": kohya["sshs_model_hash"]}
    assert plain.keys() == kohya.keys() | {"lora_adapter_metadata"}
    config = json.loads(plain["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in config} == set(models)
    assert config["unet.r"] == config["unet.lora_alpha"] == 4
    for name in config["unet.target_modules"]:
        assert name.endswith(small.UNET_TARGETS)
    for file, metadata in ((FILE_NAME, plain), (KOHYA_FILE, kohya)):
        # kohya's hash covers the tensors' bytes, which follow the header and its 8-byte length.
        content = (folder / file).read_bytes()
        body = content[8 + int.from_bytes(content[:8], "little") :]
        assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
        assert body == save(load_file(folder / file))[-len(body) :]


def test_files_are_reproducible_and_no_other_file_is_left(models, folder, tmp_path):
    run_folder = tmp_path / "icons"
    for _ in range(2):  # the second export replaces the first
        save_diffusers(run_folder, models, base_model="b", kohya=True)
    assert sorted(path.name for path in run_folder.iterdir()) == [KOHYA_FILE, FILE_NAME]
    # An older kohya file is removed.
    save_diffusers(run_folder, models, base_model="b")
    assert [path.name for path in run_folder.iterdir()] == [FILE_NAME]
    metadata = small.read_metadata(run_folder / FILE_NAME)
    assert metadata["sshs_model_hash"] == small.read_metadata(folder / FILE_NAME)["sshs_model_hash"]


def test_invalid_exports_are_refused(models, tmp_path):
    broken = small.add_adapters(small.make_unet(), AdapterSpec(target_modules=small.ATTENTION))
    with torch.no_grad():
        adapters.parameters(broken, PRIMARY)[0].fill_(float("nan"))
    untrained = {**models, "unet": small.make_unet()}
    adapters.inject(untrained["unet"], AdapterSpec(target_modules=small.ATTENTION), PRIMARY)
    (tmp_path / "file").write_text("")
    for name, saved_models, sentence in (
        ("new", {}, "no model"),
        ("new", {"text_encodr": models["unet"]}, "text_encodr.*text_encoder"),
        ("new", {"unet": small.make_unet()}, 'no adapter "default"'),
        ("new", {"unet": broken}, "not finite"),
        ("new", untrained, "adapter of unet .* every B is zero"),
        ("file", models, "is a file"),
    ):
        with pytest.raises((UserError, TrainingError), match=sentence):
            save_diffusers(tmp_path / name, saved_models, base_model="base")
    assert not (tmp_path / "new").exists()


LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def change_values(tensors, metadata):
    tensors[f"{LAYER}.lora_A.weight"] *= 1.0001


def drop_layer(tensors, metadata):
    del tensors[f"{LAYER}.lora_A.weight"], tensors[f"{LAYER}.lora_B.weight"]


def add_tensor(tensors, metadata):
    tensors["unet.stray"] = torch.zeros(1)


def add_auxiliary(tensors, metadata):
    tensors[f"{LAYER}.lora_A.auxiliary.weight"] = tensors[f"{LAYER}.lora_A.weight"].clone()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_values, "differs"),
        (drop_layer, "agree"),
        (add_tensor, "only the primary"),
        (add_auxiliary, "only the primary"),
    ],
)
def test_a_file_that_differs_from_the_models_is_refused(models, folder, tmp_path, change, sentence):
    layers = {name: trained_layers(model) for name, model in models.items()}
    assert compare(folder / FILE_NAME, layers)["max_relative_difference"] < 3e-7
    small.rewrite(folder / FILE_NAME, tmp_path / FILE_NAME, change)
    with pytest.raises(TrainingError, match=sentence):
        compare(tmp_path / FILE_NAME, layers)


def test_an_incorrectly_written_file_does_not_get_its_final_name(models, tmp_path, monkeypatch):
    def wrong_tensors(parts):
        tensors = diffusers_tensors(parts)
        tensors[f"{LAYER}.lora_A.weight"] *= 1.0001
        return tensors

    monkeypatch.setattr(writer, "diffusers_tensors", wrong_tensors)
    with pytest.raises(TrainingError, match="differs"):
        save_diffusers(tmp_path, models, base_model="base")
    assert not list(tmp_path.iterdir())


def test_a_wrong_alpha_in_kohyas_file_is_refused(models, folder, tmp_path):
    def change_alpha(tensors, metadata):
        tensors["lora_unet_time_embed_0.alpha"].add_(1)

    small.rewrite(folder / KOHYA_FILE, tmp_path / KOHYA_FILE, change_alpha)
    layers = {name: trained_layers(model) for name, model in models.items()}
    with pytest.raises(TrainingError, match="differs"):
        compare(tmp_path / KOHYA_FILE, layers)
