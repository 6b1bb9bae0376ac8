"""bilora_diffusion.export on small models: names, scale, metadata, and what readers make of it."""

import copy
import hashlib
import json
import re
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
from bilora_diffusion.export.reader import verify
from bilora_diffusion.export.writer import save_diffusers
from bilora_diffusion.image import pipeline as image_pipeline
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from tests.export import export_models as small
from tests.export.comfy_names import SDXL_ENDINGS, SDXL_KEYS


@pytest.fixture(scope="module")
def plain_unet():
    return small.make_unet()


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 12),
    alpha=st.floats(0.1, 64, allow_nan=False).map(lambda value: round(value, 3)),
    dora=st.booleans(),
    double=st.booleans(),
)
def test_change_is_scale_times_b_a(plain_unet, tmp_path_factory, rank, alpha, dora, double):
    model = copy.deepcopy(plain_unet).to(torch.float64 if double else torch.float32)
    spec = AdapterSpec(rank=rank, alpha=alpha, use_dora=dora, target_modules=("to_q", "conv1"))
    small.add_adapters(model, spec, seed=rank)
    folder = tmp_path_factory.mktemp("property")
    save_diffusers(folder, {"unet": model}, base_model="base", kohya=True)
    report = verify(folder, {"unet": model})
    assert report["max_relative_difference"] < 3e-7
    assert report["kohya_max_relative_difference"] < 3e-7
    if not double and (alpha / rank).hex().startswith("0x1.0000000000000p"):
        assert report["max_abs_difference"] == 0  # a power of two is exact
    tensors = load_file(folder / FILE_NAME)
    for name, layer in adapters.layers(model, PRIMARY):
        A, B = (tensors[f"unet.{name}.lora_{side}.weight"].flatten(1) for side in "AB")
        # in fp32 against PEFT's own s * B @ A
        expected = cast(Any, layer).get_delta_weight(PRIMARY).flatten(1).float()
        torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)


MODELS = ("unet", "text_encoder", "text_encoder_2")


def draw(pipeline):
    (image,) = generate(pipeline, ["a fox"], [0], size=64, steps=2, guidance_scale=3.0)
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize(("alpha", "dora"), [(6, False), (8, True)])
def test_images_from_file_equal_those_from_memory_and_comfyui_finds_every_key(
    alpha, dora, tmp_path
):
    trained, loaded = (load_pipeline("mini", dtype=torch.float32) for _ in range(2))
    places = image_pipeline.select_layers(["all"], family_of(trained), trained.unet)
    models = {}
    for name in MODELS:
        targets = places if name == "unet" else "all-linear"
        spec = AdapterSpec(rank=4, alpha=alpha, use_dora=dora, target_modules=targets)
        model = models[name] = small.add_adapters(getattr(trained, name), spec)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(0.05 if parameter.dim() > 1 else 1)
        if dora:  # whose magnitudes are those of the weights
            for _, layer in adapters.layers(model, PRIMARY):
                weight = adapters.base_weight(layer).detach()
                magnitude = cast(Any, layer).lora_magnitude_vector[PRIMARY].weight
                magnitude.data = weight.flatten(1).norm(dim=1).view(magnitude.shape)
    small.export_all(tmp_path / "dog", models)
    before, both = draw(loaded), draw(trained)
    with adapters.only(nn.ModuleDict(models), [PRIMARY]):
        expected = draw(trained)
    assert np.abs(before - expected).max() > 12
    assert np.abs(both - expected).max() > 2  # here the auxiliary acts too
    loaded.load_lora_weights(tmp_path / "dog")  # of the two files, diffusers takes its own
    assert np.abs(draw(loaded) - expected).max() <= 1
    if not dora:  # diffusers drops dora_scale from kohya files
        loaded.unload_lora_weights()
        loaded.load_lora_weights(tmp_path / "dog", weight_name="dog.safetensors")
        assert np.abs(draw(loaded) - expected).max() <= 1
    keys = list(load_file(tmp_path / "dog" / "dog.safetensors"))
    layer = re.compile("|".join(SDXL_KEYS))
    ends = {key: next((e for e in SDXL_ENDINGS if key.endswith(e)), "") for key in keys}
    assert all(end and layer.fullmatch(key.removesuffix(end)) for key, end in ends.items())
    assert any(key.endswith(".dora_scale") for key in keys) == dora


def test_kohyas_file_is_named_after_the_run():
    for folder, expected in (
        ("runs/icons/", "icons.safetensors"),
        ("/", "lora.safetensors"),
        ("runs/.hidden", "hidden.safetensors"),  # the hub's upload leaves out names with a dot
        ("a<lora:b:1>, c", "a_lora_b_1__ c.safetensors"),
        ("my_pytorch_lora_weights", "my_pytorch_lora_weights-kohya.safetensors"),
        ("\udcff", "_.safetensors"),
        ("ü" * 120, f"{'ü' * 90}.safetensors"),
    ):
        assert kohya_file_name(folder) == expected


def test_metadata(models, folder):
    plain, kohya = (small.read_metadata(folder / file) for file in (FILE_NAME, "icons.safetensors"))
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
    assert {key: kohya[key] for key in expected} == expected
    assert kohya.keys() == {*expected, "sshs_model_hash"}  # too small to be called SDXL's
    assert plain.keys() == {*kohya, "lora_adapter_metadata"}
    config = json.loads(plain["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in config} == set(models)
    assert config["unet.r"] == config["unet.lora_alpha"] == 4
    assert all(name.endswith(small.UNET_TARGETS) for name in config["unet.target_modules"])
    for file, metadata in ((FILE_NAME, plain), ("icons.safetensors", kohya)):
        content = (folder / file).read_bytes()
        body = content[8 + int.from_bytes(content[:8], "little") :]
        assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
        assert body == save(load_file(folder / file))[-len(body) :]


def test_files_are_reproducible_and_nothing_else_is_left(models, folder, tmp_path):
    run_folder = tmp_path / "icons"
    for _ in range(2):  # the second replaces the first
        save_diffusers(run_folder, models, base_model="b", kohya=True)
    assert sorted(p.name for p in run_folder.iterdir()) == sorted((FILE_NAME, "icons.safetensors"))
    save_diffusers(run_folder, models, base_model="b")
    assert [p.name for p in run_folder.iterdir()] == [FILE_NAME]  # no kohya file of other weights
    hashes = {small.read_metadata(f / FILE_NAME)["sshs_model_hash"] for f in (run_folder, folder)}
    assert len(hashes) == 1


def test_refusals_of_save(models, tmp_path):
    broken = small.add_adapters(small.make_unet(), AdapterSpec(target_modules=small.ATTENTION))
    with torch.no_grad():
        adapters.parameters(broken, PRIMARY)[0].fill_(float("nan"))
    (tmp_path / "file").write_text("")
    for name, chosen, word in (
        ("new", {}, "no model"),
        ("new", {"text_encodr": models["unet"]}, "text_encodr.*text_encoder"),
        ("new", {"unet": small.make_unet()}, 'no adapter "default"'),
        ("new", {"unet": broken}, "not finite"),
        ("file", models, "is a file"),
    ):
        with pytest.raises((UserError, TrainingError), match=word):
            save_diffusers(tmp_path / name, chosen, base_model="base")
    assert not (tmp_path / "new").exists()


def test_verify_finds_what_is_wrong(models, folder, tmp_path):
    name = next(key for key in load_file(folder / FILE_NAME) if key.endswith("to_q.lora_A.weight"))
    hidden = name.replace("lora_A.weight", "lora_A.auxiliary.weight")
    kohyas, kohya_target = "icons.safetensors", kohya_file_name(tmp_path)
    for file, target, change, word in (
        (FILE_NAME, FILE_NAME, lambda t: t.update({name: t[name] * 1.0001}), "differs"),
        (FILE_NAME, FILE_NAME, lambda t: (t.pop(name), t.pop(name.replace("_A", "_B"))), "agree"),
        (FILE_NAME, FILE_NAME, lambda t: t.update({"unet.stray": torch.zeros(1)}), "alone"),
        (FILE_NAME, FILE_NAME, lambda t: t.update({hidden: t[name].clone()}), "alone"),
        (kohyas, kohya_target, lambda t: t["lora_unet_time_embed_0.alpha"].add_(1), "differs"),
    ):
        small.rewrite(folder / FILE_NAME, tmp_path / FILE_NAME, lambda *_: None)
        small.rewrite(
            folder / file, tmp_path / target, lambda tensors, _, change=change: change(tensors)
        )
        with pytest.raises(TrainingError, match=word):
            verify(tmp_path, models)
