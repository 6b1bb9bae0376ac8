"""`python -m bilora_diffusion.export FILE --to FORMAT`: all formats hold the same change."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.core.lora_names import CONFIG, FILE_NAME, WEIGHTS
from bilora_diffusion.export import formats, writer
from bilora_diffusion.export.__main__ import main
from bilora_diffusion.export.conversion import convert
from bilora_diffusion.export.formats import kohya_name, plain_name
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.writer import save_adapter
from bilora_diffusion.text.models import load_text_model
from tests.export.export_models import add_adapters, all_models, equal, export_all, plain_models
from tests.scripts.runs import ROOT
from tests.text.text_builders import save_llama

# Configurations of published models
MODELS = ROOT / "results" / "dry_run_memory" / "models.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Export a UNet with convolutions and both text encoders, with DoRA, in both formats."""
    models = all_models(rank=4, alpha=6, use_dora=True)
    return export_all(tmp_path_factory.mktemp("convert") / "icons", models)


@pytest.fixture
def model(tmp_path):
    """Return a language model with a primary and an auxiliary that are not zero."""
    base = save_llama(tmp_path / "base")
    return add_adapters(load_text_model(str(base)).model, AdapterSpec(rank=2, alpha=4))


def test_conversion_through_all_formats_keeps_the_tensors(folder, tmp_path):
    source, kohya = folder / FILE_NAME, folder / "icons.safetensors"
    converted = convert(source, "kohya", tmp_path / "a.safetensors")
    assert equal(converted, kohya)
    metadata = inspect(converted).metadata
    assert metadata["bilora.rho"] == "0.05"
    assert metadata["ss_output_name"] == "a"
    assert equal(convert(kohya, "diffusers", tmp_path / "b.safetensors"), source)
    peft = convert(kohya, "peft", tmp_path / "peft")
    assert {part.name for part in peft.iterdir()} == {"unet", "text_encoder", "text_encoder_2"}
    # A folder gets a file of the usual name.
    assert equal(convert(peft, "diffusers", tmp_path / "back"), source)
    assert convert(peft, "kohya").name == "peft-kohya.safetensors"
    # PEFT's keys do not name the model, but the folder's name does.
    encoder = convert(peft / "text_encoder_2", "kohya", tmp_path / "c.safetensors")
    assert set(inspect(encoder).layers) == {"text_encoder_2"}


def stored_products(file):
    """Return (model, layer) -> B A of a diffusers file, where text encoders have other endings."""
    tensors = load_file(file)
    products = {}
    for key, A in tensors.items():
        if key.endswith(("lora_A.weight", "down.weight")):
            B = tensors[key.replace("lora_A.weight", "lora_B.weight").replace(".down.", ".up.")]
            component, _, layer = key.partition(".lora_")[0].partition(".")
            products[component, plain_name(layer)] = B.flatten(1) @ A.flatten(1)
    return products


def test_peft_loads_the_same_change(folder, tmp_path):
    products = stored_products(folder / FILE_NAME)
    peft = convert(folder / FILE_NAME, "peft", tmp_path / "peft")
    for component, model in plain_models().items():
        loaded_model = PeftModel.from_pretrained(model, str(peft / component))
        for name, A, B, scale in adapters.factors(loaded_model, PRIMARY):
            expected = products.pop((component, plain_name(name)))
            torch.testing.assert_close(scale * B @ A, expected)
    assert not products


# Key of a layer in files of kohya's own scripts, which use SDXL's names -> diffusers' key
KOHYAS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.weight"
    ),
    "lora_unet_output_blocks_2_0_in_layers_2": "unet.up_blocks.0.resnets.2.conv1.lora_{AB}.weight",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{way}.weight"
    ),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": (
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.{way}.weight"
    ),
}


def kohya_file(path, alpha=4, dtype=torch.float32, other_tensors=None):
    """Write a file as kohya's own scripts do, with alpha and a separate rank for a convolution."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(other_tensors or {})
    for name in KOHYAS:
        down_shape, up_shape = (4, 5), (6, 4)
        if "in_layers" in name:
            down_shape, up_shape = (2, 5, 3, 3), (6, 2, 1, 1)
        tensors[f"{name}.lora_down.weight"] = torch.randn(down_shape, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(up_shape, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    save_file(stored, path, {"ss_tag_frequency": "{}"})
    return path


@pytest.mark.parametrize(
    ("alpha", "dtype", "dtype_of_B"),
    [
        (3, torch.float16, torch.float32),  # 3/4 of a number needs more than 16 bits
        (2, torch.float16, torch.float16),
        (None, torch.bfloat16, torch.bfloat16),  # a missing alpha equals the rank
    ],
)
def test_a_file_from_kohyas_own_scripts_is_converted(tmp_path, alpha, dtype, dtype_of_B):
    source = kohya_file(tmp_path / "foreign.safetensors", alpha, dtype)
    converted = convert(source, "diffusers")
    assert converted == tmp_path / "foreign-diffusers.safetensors"
    source_tensors, stored = load_file(source), load_file(converted)
    assert len(stored) == 2 * len(KOHYAS)
    for theirs, ours in KOHYAS.items():
        down = source_tensors[f"{theirs}.lora_down.weight"].double()
        up = source_tensors[f"{theirs}.lora_up.weight"].double()
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        A = stored[ours.format(AB="A", way="down")]
        B = stored[ours.format(AB="B", way="up")]
        assert A.dtype == dtype
        # Scaling by a power of two keeps the dtype.
        assert B.dtype == (dtype if scale in (0.5, 1) else dtype_of_B)
        product = B.double().flatten(1) @ A.double().flatten(1)
        torch.testing.assert_close(product, scale * up.flatten(1) @ down.flatten(1))
    metadata = inspect(converted).metadata
    assert metadata["ss_tag_frequency"] == "{}"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert "ss_base_model_version" not in metadata  # nothing shows that these layers are SDXL's
    kohya = convert(converted, "kohya", tmp_path / "back.safetensors")
    assert inspect(kohya).layers == inspect(source).layers


def test_layers_with_sdxls_input_width_are_labeled_as_sdxl(tmp_path):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    tensors = {f"{key}_A.weight": torch.ones(2, 2048), f"{key}_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    for format_ in ("kohya", "diffusers"):
        metadata = inspect(convert(tmp_path / "a.safetensors", format_)).metadata
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def test_every_layer_name_is_recovered_from_its_kohya_name():
    def layer_names(model):
        names = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                names.append(plain_name(name))
        return names

    with torch.device("meta"):
        config = json.loads(MODELS.read_text())["Stable Diffusion XL"]["denoiser"][1]
        sdxl = UNet2DConditionModel(**config)
        models = [*plain_models().items(), ("unet", sdxl)]
    for component, model in models:
        prefix = kohya_name(component, "").removesuffix("text_model_")
        layers = {}
        for name in layer_names(model):
            layers[kohya_name(component, name).removeprefix(prefix)] = name
        names_back = formats.module_names(component, layers)
        for kohya, name in layers.items():
            assert plain_name(names_back[kohya]) == name
    # Names in SDXL's original code
    original = ["input_blocks_3_0_op", "input_blocks_4_0_skip_connection", "middle_block_1_proj_in"]
    original += ["middle_block_2_out_layers_3", "output_blocks_5_2_conv", "input_blocks_0_0"]
    original += ["output_blocks_0_1_transformer_blocks_9_ff_net_0_proj", "label_emb_0_2", "out_2"]
    assert set(formats.module_names("unet", original).values()) <= set(layer_names(sdxl))


def test_a_language_models_adapter_can_not_be_converted(model, tmp_path, capsys):
    save_adapter(tmp_path, model, base_model="some/llama", kind="causal")
    for format_ in ("kohya", "diffusers", "peft"):
        assert main([str(tmp_path), "--to", format_]) == 2
        assert "some/llama" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0
    assert "peft" in capsys.readouterr().out


def test_invalid_conversions_are_refused(folder, tmp_path):
    layer = "lora_unet_down_blocks_1_attentions_0_proj_in"  # named as in diffusers
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(4, 5),
        f"{layer}.lora_up.weight": torch.ones(6, 4),
    }
    mixed = kohya_file(tmp_path / "mixed.safetensors", other_tensors=tensors)
    foreign_file = kohya_file(tmp_path / "foreign.safetensors")
    for path, format_, output, sentence in (
        (foreign_file, "kohya", folder / "icons.safetensors", "icons.safetensors exists"),
        (mixed, "peft", None, "with diffusers' names"),
        (folder / FILE_NAME, "kohya", tmp_path / "lora.bin", "pickle"),
    ):
        with pytest.raises(UserError, match=sentence):
            convert(path, format_, output)


def test_a_misspelled_flag_is_refused_with_a_suggestion(capsys):
    assert main(["runs/dog", "--stp", "1"]) == 2
    assert 'unexpected "--stp" (did you mean "--step"?)' in capsys.readouterr().err


def test_an_existing_identical_export_is_reported_and_another_one_is_kept(folder, tmp_path, capsys):
    run_files = sorted(folder.iterdir())
    # The run itself has written the kohya file.
    assert main([str(folder), "--to", "kohya"]) == 0
    assert capsys.readouterr().out == f"is there already: {folder / 'icons.safetensors'}\n"
    peft = tmp_path / "peft"
    words = [str(folder), "--to", "peft", "--output", str(peft)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{peft}\n"
    assert main(words) == 0
    assert "is there already" in capsys.readouterr().out
    # A different export in the same place is not replaced.
    (peft / "unet" / CONFIG).write_text("{")
    assert main(words) == 2
    assert sorted(folder.iterdir()) == run_files


def test_a_second_export_replaces_the_first_unless_it_is_not_finite(model, tmp_path):
    value = adapters.parameters(model, PRIMARY)[0]
    partial_export = tmp_path / ".adapter.partial"  # left by a run that was killed while exporting
    partial_export.mkdir()
    (partial_export / "file").write_text("")
    save_adapter(tmp_path, model, base_model="a", kind="causal")
    with torch.no_grad():
        value.add_(1)
    save_adapter(tmp_path, model, base_model="b", kind="causal")
    assert any(torch.equal(value, stored) for stored in load_file(tmp_path / WEIGHTS).values())
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "b"
    assert not partial_export.exists()
    before = (tmp_path / WEIGHTS).read_bytes()
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            value[0, 0] = broken
        with pytest.raises(TrainingError, match=r"lora_A\.weight is not finite"):
            save_adapter(tmp_path, model, base_model="a", kind="causal")
        assert (tmp_path / WEIGHTS).read_bytes() == before


def test_an_untrained_adapter_is_not_exported(tmp_path):
    base = save_llama(tmp_path / "base")
    model = load_text_model(str(base)).model
    adapters.inject(model, AdapterSpec(rank=2, alpha=4), PRIMARY)
    with pytest.raises(TrainingError, match="every B is zero"):
        save_adapter(tmp_path, model, base_model="some/llama", kind="causal")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_adapter_that_reads_back_differently_does_not_get_its_final_name(
    model, tmp_path, monkeypatch
):
    def without_a_tensor(path):
        tensors = load_file(path)
        del tensors[min(tensors)]
        return tensors

    def with_other_values(path):
        return {key: tensor + 1 for key, tensor in load_file(path).items()}

    for read_back, sentence in (
        (without_a_tensor, "does not have exactly the trained tensors"),
        (with_other_values, "differs"),
    ):
        monkeypatch.setattr(writer, "load_file", read_back)
        with pytest.raises(TrainingError, match=sentence):
            save_adapter(tmp_path, model, base_model="a", kind="causal")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
