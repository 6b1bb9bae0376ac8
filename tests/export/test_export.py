"""bilora_diffusion.export on small models: names, scale, metadata, read-back."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.errors import TrainingError, UserError
from bilora_diffusion.export import (
    FILE_NAME,
    kohya_file_name,
    save_diffusers,
    training_facts,
    verify,
)
from bilora_diffusion.export.layers import kohya_name
from tests.export.export_models import (
    ATTENTION,
    UNET_TARGETS,
    add_adapters,
    all_models,
    make_unet,
    plain_models,
    read_metadata,
    rewrite,
)


@pytest.fixture(scope="module")
def plain_unet() -> nn.Module:
    return make_unet()


def test_read_back_equals_the_primary_also_in_models_of_the_caller(models, folder) -> None:
    report = verify(folder, models)
    assert report["layers"] == sum(len(adapters.factors(m, PRIMARY)) for m in models.values())
    assert report["auxiliary_keys"] == 0
    assert report["max_relative_difference"] < 2e-7  # one rounding of 1.5 * B to fp32
    assert report["kohya_max_relative_difference"] < 2e-7

    def fresh() -> dict[str, nn.Module]:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return {
            name: model.to(dtype)
            for (name, model), dtype in zip(plain_models().items(), dtypes, strict=True)
        }

    assert verify(folder, models, fresh)["max_relative_difference"] < 2e-7


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 12),
    alpha=st.floats(0.1, 64, allow_nan=False).map(lambda value: round(value, 3)),
    dora=st.booleans(),
    double=st.booleans(),
)
def test_change_is_scale_times_b_a(plain_unet, tmp_path_factory, rank, alpha, dora, double) -> None:
    model = copy.deepcopy(plain_unet).to(torch.float64 if double else torch.float32)
    spec = AdapterSpec(rank=rank, alpha=alpha, use_dora=dora, target_modules=("to_q", "conv1"))
    add_adapters(model, spec, seed=rank)
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


def test_dora_of_all_models_reads_back(tmp_path) -> None:
    models = all_models(rank=2, alpha=3, use_dora=True)
    save_diffusers(tmp_path, models, base_model="base", kohya=True)
    assert verify(tmp_path, models)["max_relative_difference"] < 2e-7
    file = tmp_path / kohya_file_name(tmp_path)
    scales = {k: v for k, v in load_file(file).items() if "dora_scale" in k}
    assert scales["lora_unet_conv_in.dora_scale"].shape == (8, 1, 1, 1)
    assert scales["lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale"].shape == (24, 1)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("component", "targets"),
    [
        *(("text_encoder_2", t) for t in (("q_proj",), ("fc1",), ("out_proj", "fc2"))),
        ("text_encoder_2", "all-linear"),
        ("unet", "all-linear"),
        ("unet", r"mid_block\..*(to_q|time_emb_proj)"),
    ],
)
def test_every_choice_of_layers_is_read_exactly(tmp_path, component, targets, dora) -> None:
    spec = AdapterSpec(use_dora=dora, target_modules=targets)  # its scale is a power of two
    models = {component: add_adapters(plain_models()[component], spec)}
    save_diffusers(tmp_path, models, base_model="base", kohya=True)
    report = verify(tmp_path, models)
    assert report["max_abs_difference"] == report["kohya_max_abs_difference"] == 0


def test_kohya_names(folder) -> None:
    keys = load_file(folder / "icons.safetensors")
    for name in (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_time_embed_0",
        "lora_unet_label_emb_0_0",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc2",
        "lora_te2_text_projection",
    ):
        assert keys[f"{name}.lora_down.weight"].shape[0] == keys[f"{name}.alpha"].item() == 4
        assert keys[f"{name}.lora_up.weight"].shape[1] == 4
    assert kohya_name("unet", "conv_in") == "lora_unet_conv_in"


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("runs/icons", "icons.safetensors"),
        ("runs/icons/", "icons.safetensors"),
        ("/", "lora.safetensors"),
        ("runs/.hidden", "hidden.safetensors"),  # the hub's upload leaves out names with a dot
        ("a<lora:b:1>, c", "a_lora_b_1__ c.safetensors"),
        ("pytorch_lora_weights", "pytorch_lora_weights-kohya.safetensors"),
        ("my_pytorch_lora_weights", "my_pytorch_lora_weights-kohya.safetensors"),
        ("Adapter_Model", "Adapter_Model-kohya.safetensors"),
        ("\udcff", "_.safetensors"),
        ("ü" * 120, f"{'ü' * 90}.safetensors"),
    ],
)
def test_kohyas_file_is_named_after_the_run(folder, expected) -> None:
    assert kohya_file_name(folder) == expected


def test_metadata(models, folder) -> None:
    plain, kohya = (read_metadata(folder / file) for file in (FILE_NAME, "icons.safetensors"))
    expected = {
        "format": "pt",
        "ss_base_model_version": "sdxl_custom",
        "ss_sd_model_name": "some/base",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_output_name": "icons",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-custom/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "icons",
        "modelspec.date": "2026-01-31",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "bilora.method": "bilora",
        "bilora.rho": "0.05",
        "bilora.original_alpha": '{"unet": 6.0, "text_encoder": 6.0, "text_encoder_2": 6.0}',
    }
    assert {key: kohya[key] for key in expected} == expected
    assert kohya.keys() == {*expected, "sshs_model_hash"}
    assert plain.keys() == {*kohya, "lora_adapter_metadata"}
    config = json.loads(plain["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in config} == set(models)
    assert config["unet.r"] == config["unet.lora_alpha"] == 4
    assert set(config["unet.target_modules"]) == set(UNET_TARGETS)


def test_the_real_sdxl_is_named(tmp_path) -> None:
    model = add_adapters(make_unet(), AdapterSpec(target_modules=ATTENTION))
    model.config["cross_attention_dim"] = 2048  # pyright: ignore
    model.register_to_config(cross_attention_dim=2048)  # pyright: ignore
    metadata = read_metadata(save_diffusers(tmp_path, {"unet": model}, base_model="base"))
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def test_hash_is_that_of_the_bytes_after_the_header(folder) -> None:
    for file in (FILE_NAME, "icons.safetensors"):
        content = (folder / file).read_bytes()
        body = content[8 + int.from_bytes(content[:8], "little") :]
        stored = read_metadata(folder / file)["sshs_model_hash"]
        assert stored == hashlib.sha256(body).hexdigest()
        assert body == save(load_file(folder / file))[-len(body) :]


def test_files_are_reproducible_and_nothing_else_is_left(models, folder, tmp_path) -> None:
    again = tmp_path / "icons"
    metadata = training_facts(method="bilora", rho=0.05)
    for _ in range(2):  # the second replaces the first
        save_diffusers(again, models, base_model="b", kohya=True, extra_metadata=metadata)
    assert sorted(p.name for p in again.iterdir()) == sorted((FILE_NAME, "icons.safetensors"))
    save_diffusers(again, models, base_model="b", extra_metadata=metadata)
    assert [p.name for p in again.iterdir()] == [FILE_NAME]  # no kohya file of other weights
    digests = {read_metadata(f / FILE_NAME)["sshs_model_hash"] for f in (again, folder)}
    assert len(digests) == 1


def test_refusals_of_save(models, tmp_path) -> None:
    broken = add_adapters(make_unet(), AdapterSpec(target_modules=ATTENTION))
    with torch.no_grad():
        adapters.parameters(broken, PRIMARY)[0].fill_(float("nan"))
    (tmp_path / "file").write_text("")
    for name, chosen, extra, word in (
        ("new", {}, {}, "no model"),
        ("new", {"text_encodr": models["unet"]}, {}, 'did you mean "text_encoder"'),
        ("new", {"unet": make_unet()}, {}, 'no adapter "default"'),
        ("new", models, {"format": "tf"}, "follows from the weights"),
        ("new", models, {"a": 1}, "turn it into text"),
        ("new", {"unet": broken}, {}, "not finite"),
        ("file", models, {}, "is a file"),
    ):
        with pytest.raises((UserError, TrainingError), match=word):
            save_diffusers(
                tmp_path / name, chosen, base_model="base", extra_metadata=cast(Any, extra)
            )
    assert not (tmp_path / "new").exists()


def test_verify_finds_what_is_wrong(models, folder, tmp_path) -> None:
    name = next(key for key in load_file(folder / FILE_NAME) if key.endswith("to_q.lora_A.weight"))

    def scale(tensors, metadata) -> None:
        tensors[name] *= 1.0001

    def lack(tensors, metadata) -> None:
        del tensors[name]
        del tensors[name.replace("lora_A", "lora_B")]

    def add(tensors, metadata) -> None:
        tensors["unet.stray"] = torch.zeros(1)

    def hide(tensors, metadata) -> None:
        tensors[name.replace("lora_A.weight", "lora_A.auxiliary.weight")] = tensors[name].clone()

    def scale_kohyas(tensors, metadata) -> None:
        tensors["lora_unet_time_embed_0.alpha"] += 1

    own = kohya_file_name(tmp_path)
    for file, target, change, word in (
        (FILE_NAME, FILE_NAME, scale, "differs"),
        (FILE_NAME, FILE_NAME, lack, "adapts"),
        (FILE_NAME, FILE_NAME, add, "1 other"),
        (FILE_NAME, FILE_NAME, hide, "alone"),
        ("icons.safetensors", own, scale_kohyas, "differs"),
    ):
        rewrite(folder / FILE_NAME, tmp_path / FILE_NAME, lambda *_: None)
        rewrite(folder / file, tmp_path / target, change)
        with pytest.raises(TrainingError, match=word):
            verify(tmp_path, models)
    with pytest.raises(UserError, match="makes no text_encoder"):
        verify(folder, models, lambda: {"unet": make_unet()})
    with pytest.raises(UserError, match="with adapters"):
        verify(folder, models, lambda: models)
