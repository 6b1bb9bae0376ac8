"""LoRA files of `--init_from` and `--assistant_lora` act as in diffusers or are refused."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import ASSISTANT, AdapterSpec
from bilora_diffusion.config.lora_sources import find_lora_source, split_strength
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.formats import Layer, Part, diffusers_tensors
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.first_values import read_start
from bilora_diffusion.image.frozen_loras import read_frozen
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.methods import Target, create
from tests.export.export_models import rewrite, write_lora
from tests.image.tiny import FILES, make_pipeline

MINI = "mini"
KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in (MINI, *FILES)]
KINDS[1] = pytest.param("StableDiffusion3Pipeline")  # one kind is fast enough
STRENGTH = 0.7


def pipeline_of(kind):
    if kind == MINI:
        return load_pipeline("mini", dtype=torch.float32)
    pipeline = make_pipeline(kind)
    pipeline.transformer.requires_grad_(False)
    return pipeline


def random_file(path, pipeline, rank, seed):
    """Write a random diffusers LoRA file with all linear layers of a pipeline's denoiser."""
    family = family_of(pipeline)
    denoiser = family.model(pipeline)
    random = torch.Generator().manual_seed(seed)
    layers = []
    for name in adapters.adaptable(denoiser):
        outputs, inputs = denoiser.get_submodule(name).weight.shape
        A = torch.randn(rank, inputs, generator=random) / inputs**0.5
        B = 0.3 * torch.randn(outputs, rank, generator=random)
        layers.append(Layer(name, A, B, None))
    save_file(diffusers_tensors({family.denoiser: Part(layers)}), path)
    return path


@torch.no_grad()
def prediction_of(pipeline):
    """Return the denoiser's prediction for two random inputs."""
    family = family_of(pipeline)
    random = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 64, 64, generator=random) * 2 - 1
    space = family.latent_space(pipeline.vae)
    latents = space.encode(space.distribution(pipeline.vae, pixels)[0])
    conditions = family.embed(pipeline, ["a TOK icon", "a cloud"])
    conditions["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    levels = torch.tensor([0.3, 0.8]) if family.flow else torch.tensor([300, 800])
    return family.predict(family.model(pipeline), latents, levels, conditions)


@pytest.mark.parametrize("kind", KINDS)
def test_files_act_as_if_diffusers_had_loaded_them(kind, tmp_path):
    """The primary starts from one file; the other file is an assistant with a strength."""
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    base = prediction_of(pipeline)
    first = random_file(tmp_path / "first.safetensors", pipeline, rank=4, seed=1)
    second = random_file(tmp_path / "second.safetensors", pipeline, rank=3, seed=2)
    pipeline.load_lora_weights(str(first), adapter_name="first")
    started = prediction_of(pipeline)
    pipeline.load_lora_weights(str(second), adapter_name="second")
    pipeline.set_adapters(["first", "second"], [1.0, STRENGTH])
    expected = prediction_of(pipeline)
    pipeline.unload_lora_weights()

    model = family.model(pipeline)
    models = {family.denoiser: model}
    source = find_lora_source("assistant_lora", str(second), STRENGTH)
    frozen = read_frozen(source, ASSISTANT, pipeline, models, "base")[family.denoiser]
    # The file has another alpha than these layers, so it is refused.
    spec = AdapterSpec(rank=4, alpha=2, target_modules=tuple(adapters.adaptable(model)))
    target = Target(family.denoiser, model, spec, 0.1, frozen=(frozen,))
    source = find_lora_source("init_from", str(first))
    with pytest.raises(UserError, match="--rank 4 --lora_alpha 4"):
        read_start(source, pipeline, [target], "base")
    spec = AdapterSpec(rank=4, alpha=4, target_modules=spec.target_modules)
    target = Target(family.denoiser, model, spec, 0.1, frozen=(frozen,))
    start = read_start(source, pipeline, [target], "base")[family.denoiser]
    method = create("lora")
    method.setup([Target(family.denoiser, model, spec, 0.1, frozen=(frozen,), start=start)])
    scale = (expected - base).abs().max()
    assert (prediction_of(pipeline) - expected).abs().max() < 1e-4 * scale
    assert (started - expected).abs().max() > 0.1 * scale
    with method.evaluating():  # the assistant is off
        assert (prediction_of(pipeline) - started).abs().max() < 1e-4 * scale


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("mini", dtype=torch.float32)


def test_a_files_text_encoder_layers_need_trained_text_encoders(pipeline, tmp_path):
    file = write_lora(tmp_path, pipeline, components=("unet", "text_encoder_2"), kohya=True)
    source = find_lora_source("assistant_lora", str(file))
    models = {"unet": pipeline.unet}
    with pytest.raises(UserError, match=r"text_encoder_2.*--train_text_encoder"):
        read_frozen(source, ASSISTANT, pipeline, models, "mini")
    models |= {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    kohya = find_lora_source("assistant_lora", str(tmp_path / f"{tmp_path.name}.safetensors"))
    files = [read_frozen(file, ASSISTANT, pipeline, models, "mini") for file in (source, kohya)]
    for frozen in files:
        assert frozen.keys() == {"unet", "text_encoder_2"}
    encoder = copy.deepcopy(pipeline.text_encoder_2)
    adapters.inject_frozen(encoder, files[0]["text_encoder_2"])
    ids = torch.tensor([[3, 4, 5, 2]])
    reference = load_pipeline("mini", dtype=torch.float32)
    reference.load_lora_weights(str(tmp_path), weight_name=file.name)
    with torch.no_grad():
        expected = reference.text_encoder_2(ids).text_embeds
        assert not torch.allclose(expected, pipeline.text_encoder_2(ids).text_embeds)
        torch.testing.assert_close(encoder(ids).text_embeds, expected)
    for key, tensor in files[0]["unet"].tensors.items():
        assert torch.equal(files[1]["unet"].tensors[key], tensor)


def test_a_file_with_other_layers_is_refused_and_another_base_models_name_is_logged(
    pipeline, tmp_path, caplog
):
    models = {"unet": pipeline.unet}
    file = write_lora(tmp_path / "run", pipeline)

    def read(file, base_model="mini"):
        source = find_lora_source("assistant_lora", str(file))
        return read_frozen(source, ASSISTANT, pipeline, models, base_model)

    def narrow(tensors, _):
        key = next(key for key in tensors if "to_q.lora_A" in key)
        tensors[key] = tensors[key][:, :-1].contiguous()

    def rename(tensors, _):
        for key in list(tensors):
            tensors[key.replace("to_q", "to_z")] = tensors.pop(key)

    assert read(file)
    assert not caplog.records
    assert read(file, "owner/other")
    assert '"mini"' in caplog.text
    assert '"owner/other"' in caplog.text
    for change, words in ((narrow, "inputs.*to_q|to_q.*inputs"), (rename, "no layer for.*to_z")):
        with pytest.raises(UserError, match=words):
            read(rewrite(file, tmp_path / "bad.safetensors", change))


def test_a_training_adapter_of_ai_toolkit_is_read(tmp_path):
    pipeline = pipeline_of("ZImagePipeline")
    models = {"transformer": pipeline.transformer}
    file = random_file(tmp_path / "file.safetensors", pipeline, rank=2, seed=0)
    tensors = {}
    for key, tensor in load_file(file).items():
        tensors[key.replace("transformer.", "diffusion_model.", 1)] = tensor
    save_file(tensors, tmp_path / "toolkit.safetensors")
    sources = [find_lora_source("assistant_lora", str(path)) for path in tmp_path.iterdir()]
    expected, actual = [read_frozen(file, ASSISTANT, pipeline, models, "") for file in sources]
    assert len(expected["transformer"].tensors) == len(tensors)
    for key, tensor in expected["transformer"].tensors.items():
        assert torch.equal(actual["transformer"].tensors[key], tensor)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a:b.safetensors:-1", ("a:b.safetensors", -1.0)),
        ("C:/a.safetensors", ("C:/a.safetensors", 1.0)),
        ("run:0", ("run", 0.0)),
    ],
)
def test_the_last_number_after_a_colon_is_the_strength(value, expected):
    assert split_strength("assistant_lora", value) == expected


@pytest.mark.parametrize("strength", ["nan", "inf", "1e9"])
def test_an_unusable_strength_is_refused(strength):
    with pytest.raises(UserError, match=strength):
        split_strength("assistant_lora", f"file:{strength}")


def test_a_folder_selects_its_file_and_the_hash_depends_only_on_the_content(pipeline, tmp_path):
    file = write_lora(tmp_path / "run", pipeline)
    source = find_lora_source("init_from", str(tmp_path / "run"))
    assert source.path == file
    moved = Path(file.rename(tmp_path / "moved.safetensors"))
    assert find_lora_source("init_from", str(moved)).sha256 == source.sha256
    with pytest.raises(UserError, match="is a folder without"):
        find_lora_source("init_from", str(tmp_path / "run"))
