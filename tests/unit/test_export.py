"""bilora_diffusion.export on small models: names, scale, metadata, read-back, inspection."""

from __future__ import annotations

import copy
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.errors import TrainingError, UserError
from bilora_diffusion.export import (
    FILE_NAME,
    KOHYA_FILE_NAME,
    inspect,
    main,
    save_diffusers,
    training_facts,
    verify,
)
from bilora_diffusion.export.layers import kohya_name

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_TARGETS = (*ATTENTION, "conv1", "linear_1", "conv_in", "ff.net.2")


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def make_text_encoder(projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=8,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def add_adapters(model: nn.Module, spec: AdapterSpec, seed: int = 0) -> nn.Module:
    """A primary and an auxiliary whose values are all random."""
    adapters.inject(model, spec, PRIMARY)
    adapters.inject(model, AdapterSpec(rank=3, target_modules=spec.target_modules), AUXILIARY)
    adapters.activate(model, (PRIMARY, AUXILIARY))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (PRIMARY, AUXILIARY):
            for parameter in adapters.parameters(model, name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def all_models(**options) -> dict[str, nn.Module]:
    return {
        "unet": add_adapters(make_unet(), AdapterSpec(target_modules=UNET_TARGETS, **options), 1),
        "text_encoder": add_adapters(make_text_encoder(), AdapterSpec(**options), 2),
        "text_encoder_2": add_adapters(make_text_encoder(True), AdapterSpec(**options), 3),
    }


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return all_models(rank=4, alpha=6)


@pytest.fixture(scope="module")
def plain_unet() -> nn.Module:
    return make_unet()


@pytest.fixture(scope="module")
def folder(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "icons"
    facts = training_facts(
        method="bilora", rho=0.05, date="2026-01-31", resolution=64, prediction_type="epsilon"
    )
    save_diffusers(folder, models, base_model="some/base", kohya=True, extra_metadata=facts)
    return folder


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as content:
        return content.metadata()


def test_read_back_equals_the_primary(models, folder) -> None:
    report = verify(folder, models)
    assert report["layers"] == sum(len(adapters.factors(m, PRIMARY)) for m in models.values())
    assert report["auxiliary_keys"] == 0
    assert report["max_relative_difference"] < 2e-7  # one rounding of 1.5 * B to fp32
    assert report["kohya_max_relative_difference"] < 2e-7


def test_read_back_into_models_of_the_caller(models, folder) -> None:
    def fresh() -> dict[str, nn.Module]:
        return {
            "unet": make_unet().to(torch.bfloat16),
            "text_encoder": make_text_encoder().half(),
            "text_encoder_2": make_text_encoder(True),
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
        expected = adapters.weight_delta(cast(nn.Module, layer), PRIMARY).flatten(1).float()
        torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)


def test_power_of_two_scale_is_exact(tmp_path) -> None:
    models = all_models(rank=4, alpha=8)
    save_diffusers(tmp_path, models, base_model="base", kohya=True)
    report = verify(tmp_path, models)
    assert report["max_abs_difference"] == report["kohya_max_abs_difference"] == 0


def test_dora_of_all_models_reads_back(tmp_path) -> None:
    models = all_models(rank=2, alpha=3, use_dora=True)
    save_diffusers(tmp_path, models, base_model="base", kohya=True)
    assert verify(tmp_path, models)["max_relative_difference"] < 2e-7
    scales = {k: v for k, v in load_file(tmp_path / KOHYA_FILE_NAME).items() if "dora_scale" in k}
    assert scales["lora_unet_conv_in.dora_scale"].shape == (8, 1, 1, 1)
    assert scales["lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale"].shape == (16, 1)


@pytest.mark.parametrize("targets", [("q_proj",), ("fc1",), ("out_proj", "fc2"), "all-linear"])
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_reads_every_choice_of_text_layers(tmp_path, targets, dora) -> None:
    spec = AdapterSpec(use_dora=dora, target_modules=targets)
    models = {"text_encoder_2": add_adapters(make_text_encoder(True), spec)}
    save_diffusers(tmp_path, models, base_model="base")
    assert verify(tmp_path, models)["max_relative_difference"] == 0


def test_every_linear_layer_of_a_unet_and_a_regular_expression(tmp_path) -> None:
    for number, targets in enumerate(("all-linear", r"mid_block\..*(to_q|time_emb_proj)")):
        model = add_adapters(make_unet(), AdapterSpec(target_modules=targets))
        folder = tmp_path / str(number)
        save_diffusers(folder, {"unet": model}, base_model="base", kohya=True)
        assert verify(folder, {"unet": model})["max_abs_difference"] == 0


def test_files_have_no_trace_of_the_auxiliary(models, folder) -> None:
    for file in (FILE_NAME, KOHYA_FILE_NAME):
        contents = inspect(folder / file)
        assert not contents.auxiliary
        assert contents.adapters == ("unnamed",)
        assert set(contents.ranks.values()) == set(contents.alphas.values()) == {(4,)}
        assert AUXILIARY.encode() not in (folder / file).read_bytes()
    assert inspect(folder / FILE_NAME).layers == inspect(folder / KOHYA_FILE_NAME).layers


def test_kohya_names(folder) -> None:
    keys = load_file(folder / KOHYA_FILE_NAME)
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


def test_metadata(models, folder) -> None:
    plain, kohya = (read_metadata(folder / file) for file in (FILE_NAME, KOHYA_FILE_NAME))
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
    for file in (FILE_NAME, KOHYA_FILE_NAME):
        content = (folder / file).read_bytes()
        body = content[8 + int.from_bytes(content[:8], "little") :]
        stored = read_metadata(folder / file)["sshs_model_hash"]
        assert stored == hashlib.sha256(body).hexdigest()
        assert body == save(load_file(folder / file))[-len(body) :]


def test_dropout_of_training_does_not_reach_the_file(tmp_path) -> None:
    spec = AdapterSpec(dropout=0.5, target_modules=ATTENTION)
    save_diffusers(tmp_path, {"unet": add_adapters(make_unet(), spec)}, base_model="base")
    fresh = make_unet()
    fresh.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=FILE_NAME)  # pyright: ignore
    dropouts = [m for n, m in fresh.named_modules() if "lora" in n and isinstance(m, nn.Dropout)]
    assert dropouts == []


def test_files_are_reproducible_and_nothing_else_is_left(models, folder, tmp_path) -> None:
    again = tmp_path / "icons"
    metadata = training_facts(method="bilora", rho=0.05)
    for _ in range(2):  # the second replaces the first
        save_diffusers(again, models, base_model="b", kohya=True, extra_metadata=metadata)
    assert sorted(p.name for p in again.iterdir()) == sorted((FILE_NAME, KOHYA_FILE_NAME))
    digests = {read_metadata(f / FILE_NAME)["sshs_model_hash"] for f in (again, folder)}
    assert len(digests) == 1


def test_a_failed_write_leaves_the_old_file(models, tmp_path, monkeypatch) -> None:
    path = save_diffusers(tmp_path, models, base_model="base")
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("bilora_diffusion.export.writer.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_diffusers(tmp_path, models, base_model="other")
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    assert path.read_bytes() == before


def test_refusals_of_save(models, tmp_path) -> None:
    unet = models["unet"]
    with pytest.raises(UserError, match="no model"):
        save_diffusers(tmp_path, {}, base_model="base")
    with pytest.raises(UserError, match='did you mean "text_encoder"'):
        save_diffusers(tmp_path, {"text_encodr": unet}, base_model="base")
    with pytest.raises(UserError, match='no adapter "default"'):
        save_diffusers(tmp_path, {"unet": make_unet()}, base_model="base")
    with pytest.raises(UserError, match="follows from the weights"):
        save_diffusers(tmp_path, models, base_model="b", extra_metadata={"format": "tf"})
    with pytest.raises(UserError, match="turn it into text"):
        save_diffusers(tmp_path, models, base_model="b", extra_metadata={"a": 1})  # pyright: ignore
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save_diffusers(tmp_path / "file", models, base_model="base")
    broken = add_adapters(make_unet(), AdapterSpec(target_modules=ATTENTION))
    with torch.no_grad():
        adapters.parameters(broken, PRIMARY)[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        save_diffusers(tmp_path / "nan", {"unet": broken}, base_model="base")
    assert not (tmp_path / "nan").exists()


def alter(folder: Path, target: Path, change) -> None:
    """Copy the diffusers file of `folder` to `target` with its tensors or metadata changed."""
    tensors, metadata = load_file(folder / FILE_NAME), read_metadata(folder / FILE_NAME)
    change(tensors, metadata)
    target.mkdir(exist_ok=True)
    save_file(tensors, target / FILE_NAME, metadata)


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

    for change, message in (
        (scale, "differs"),
        (lack, "adapts"),
        (add, "1 other"),
        (hide, "alone"),
    ):
        alter(folder, tmp_path, change)
        with pytest.raises(TrainingError, match=message):
            verify(tmp_path, models)
    with pytest.raises(UserError, match="makes no text_encoder"):
        verify(folder, models, lambda: {"unet": make_unet()})
    with pytest.raises(UserError, match="with adapters"):
        verify(folder, models, lambda: models)


def test_verify_finds_a_wrong_kohya_file(models, folder, tmp_path) -> None:
    save_diffusers(tmp_path, models, base_model="base", kohya=True)
    tensors = load_file(tmp_path / KOHYA_FILE_NAME)
    tensors["lora_unet_time_embed_0.alpha"] += 1
    save_file(tensors, tmp_path / KOHYA_FILE_NAME)
    with pytest.raises(TrainingError, match="differs"):
        verify(tmp_path, models)


@pytest.mark.parametrize("way", ["named", "doubled", "rank", "configured", "listed", "kohya"])
def test_a_smuggled_auxiliary_is_reported(folder, tmp_path, way, capsys) -> None:
    def change(tensors, metadata) -> None:
        pairs = {key: value for key, value in tensors.items() if key.startswith("unet.")}
        for key, value in pairs.items():
            kind = "lora_A.weight" if "lora_A" in key else "lora_B.weight"
            if way == "named":
                tensors[key.replace(".weight", ".auxiliary.weight")] = value.clone()
            elif way == "doubled":
                other = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
                tensors[key.replace(kind, other[kind])] = value.clone()
            elif way == "kohya":
                other = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
                name = key.removeprefix("unet.").removesuffix(f".{kind}").replace(".", "_")
                tensors[f"lora_unet_{name}.{other[kind]}"] = value.clone()
            elif way == "rank":
                tensors[key] = torch.cat([value, value], dim=int(kind == "lora_B.weight"))
        if way == "configured":
            config = json.loads(metadata["lora_adapter_metadata"])
            metadata["lora_adapter_metadata"] = json.dumps({**config, "unet.auxiliary.r": 4})
        if way == "listed":
            metadata["adapter_names"] = "default, auxiliary"

    alter(folder, tmp_path, change)
    contents = inspect(tmp_path / FILE_NAME)
    assert contents.auxiliary
    assert main([str(tmp_path / FILE_NAME)]) == 0
    assert "auxiliary   FOUND" in capsys.readouterr().out
    assert main([str(tmp_path / FILE_NAME), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auxiliary"] is True


def test_inspect_reads_peft_files(tmp_path) -> None:
    model = add_adapters(make_text_encoder(), AdapterSpec(rank=2, alpha=6))
    adapters.save_pretrained(model, tmp_path)
    contents = inspect(tmp_path / "adapter_model.safetensors")
    assert (contents.format, contents.auxiliary) == ("peft", False)
    assert (contents.layers, contents.ranks) == ({"model": 12}, {"model": (2,)})
    assert contents.alphas == {"model": (6.0,)}
    assert contents.parameters == sum(p.numel() for p in adapters.parameters(model, PRIMARY))


def test_inspect_names_every_adapter_of_a_raw_state(tmp_path) -> None:
    model = add_adapters(make_unet(), AdapterSpec(target_modules=ATTENTION))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "lora" in k}
    save_file(state, tmp_path / "raw.safetensors")
    contents = inspect(tmp_path / "raw.safetensors")
    assert contents.adapters == (PRIMARY, AUXILIARY) or contents.adapters == (AUXILIARY, PRIMARY)
    assert contents.auxiliary
    assert contents.format == "unknown"
    assert contents.ranks == {"model": (3, 4)}


def test_table(folder, capsys) -> None:
    assert main([str(folder / KOHYA_FILE_NAME)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "format      kohya" in lines
    assert any(line.split() == ["text_encoder", "12", "4", "4"] for line in lines)
    assert any(line.split() == ["bilora.method", "bilora"] for line in lines)
    assert lines[-1] == "auxiliary   none"
    assert max(map(len, lines[1:])) <= 110


def test_unreadable_files_are_refused_in_one_sentence(folder, tmp_path, capsys) -> None:
    whole = (folder / FILE_NAME).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-10])
    (tmp_path / "header.safetensors").write_bytes(whole[:100])
    (tmp_path / "text.safetensors").write_text("not a file of weights")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    torch.save({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pickle.bin")
    metadata = {"lora_adapter_metadata": "{"}
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "json.safetensors", metadata)
    for name in ("short", "header", "text", "empty", "model", "json", "missing"):
        check_refusal(tmp_path / f"{name}.safetensors", capsys)
    check_refusal(tmp_path / "pickle.bin", capsys)
    check_refusal(tmp_path, capsys)


def check_refusal(path: Path, capsys) -> None:
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert str(path) in captured.err


def test_module_runs_as_a_script(folder, tmp_path, monkeypatch, capsys) -> None:
    for path, code in ((folder / FILE_NAME, 0), (tmp_path / "missing", 2)):
        monkeypatch.setattr(sys, "argv", ["export", str(path)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("bilora_diffusion.export", run_name="__main__")
        assert exit.value.code == code
    assert "auxiliary   none" in capsys.readouterr().out
