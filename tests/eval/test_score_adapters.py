"""What an argument names and is called, and its weights in a pipeline and out again."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.conversion import convert
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed, generate
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
    """LoRA files in the folders "unet" and "text" (both text encoders as well)."""
    root = tmp_path_factory.mktemp("files")
    write_lora(root / "unet", pipeline, kohya=True)
    components = ("unet", "text_encoder", "text_encoder_2")
    write_lora(root / "text", pipeline, size=1.0, components=components)
    return root


def test_the_digest_is_of_the_weights_alone(files, tmp_path):
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
    assert altered(lambda t, _: t.update({key: t[key].half()})) != digest


def test_all_adapters_belong_to_one_base(files, tmp_path):
    weights = files / "unet" / FILE
    change = {"ss_sd_model_name": "owner/other"}
    foreign_file = rewrite(weights, tmp_path / "o.safetensors", lambda _, m: m.update(change))
    silent = rewrite(weights, tmp_path / "s.safetensors", lambda _, m: m.pop("bilora.method"))
    base, mini, foreign, silent_subject = single(
        ["base", *map(str, (weights, foreign_file, silent))]
    )
    assert silent_subject.base_model is None
    assert base_model([base, mini, silent_subject], None) == "mini"
    assert base_model([base, silent_subject], "owner/x") == "owner/x"
    assert base_model([foreign], str(tmp_path)) == str(tmp_path)  # a local copy
    for subjects, base_name, sentence in (
        ([mini, foreign], None, "mini.*owner/other"),
        ([base, silent_subject], None, "--base_model"),
        ([foreign], "mini", "owner/other.*mini"),
    ):
        with pytest.raises(UserError, match=sentence):
            base_model(subjects, base_name)


def picture(pipeline):
    """Its pixels as they come from the pipeline's text encoders and UNet, (64, 64, 3)."""
    (image,) = generate(pipeline, [PROMPT], [3], size=64, steps=2, guidance_scale=4.0)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["unet", "text", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_adapter_acts_as_trained_and_the_base_is_as_before_even_after_an_error(
    name, pipeline, files
):
    run = train_once("full", method="full") if name == "whole" else files / name
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    state = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    image, text = picture(pipeline), embed(pipeline, [PROMPT])
    with applied(pipeline, find(str(run))):
        inside = picture(pipeline)
        assert not np.array_equal(inside, image)
        is_same_text = torch.equal(embed(pipeline, [PROMPT])["sequence"], text["sequence"])
        assert is_same_text == (name != "text")
        assert not any(p.requires_grad for p in pipeline.unet.parameters())
        assert not pipeline.unet.training
        if name == "whole":
            trained = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
            assert all(torch.equal(p, trained[k]) for k, p in pipeline.unet.named_parameters())
        else:
            reference = load_pipeline("mini", dtype=torch.float32)
            reference.load_lora_weights(str(run), weight_name=FILE)
            assert np.array_equal(inside, picture(reference))
    with pytest.raises(ZeroDivisionError), applied(pipeline, find(str(run))):
        raise ZeroDivisionError
    if name == "whole":
        with pytest.raises(UserError, match="no scale"), applied(pipeline, find(str(run)), 0.5):
            pass
    elif name == "unet":
        with applied(pipeline, find(str(run)), 0.0):
            assert np.array_equal(picture(pipeline), image)
    assert (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) == parts
    assert not any(pipeline.get_list_adapters().values())
    after = pipeline.unet.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert torch.equal(embed(pipeline, [PROMPT])["sequence"], text["sequence"])
    assert np.array_equal(picture(pipeline), image)


@torch.no_grad()
def predicted(unet):
    """What the UNet makes of some noise."""
    config, draw = unet.config, torch.Generator().manual_seed(0)
    sample = torch.randn(1, config.in_channels, 8, 8, generator=draw)
    words = torch.randn(1, 7, config.cross_attention_dim, generator=draw)
    ids = torch.ones(1, 6)
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, width, generator=draw), "time_ids": ids}
    return unet(sample, 500, words, added_cond_kwargs=added).sample


def test_kohyas_ranks_alphas_and_magnitudes_act_as_they_stand(pipeline, tmp_path):
    """Rank and alpha are 4, but for queries and convolutions; expected is what is made by hand."""
    tensors, draw = {}, torch.Generator().manual_seed(0)
    by_hand = copy.deepcopy(pipeline.unet)
    for path, module in by_hand.named_modules():
        if not path.endswith(("to_q", "to_k", "to_v", "conv1")):
            continue
        rank, alpha = (2, 4.0) if path.endswith(("to_q", "conv1")) else (4, 4.0)
        weight, name = module.weight.data, f"lora_unet_{path.replace('.', '_')}"
        (m, n, *kernel), trailing = weight.shape, [1] * (weight.dim() - 2)
        down = torch.randn(rank, n, *kernel, generator=draw) / 8
        up = torch.randn(m, rank, *trailing, generator=draw) / 8
        layer = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
        weight += alpha / rank * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        layer["dora_scale"] = (torch.rand(m, generator=draw) + 0.5).reshape(-1, 1, *trailing)
        weight *= layer["dora_scale"] / weight.flatten(1).norm(dim=1).reshape(-1, 1, *trailing)
        tensors |= {f"{name}.{kind}": value for kind, value in layer.items()}
    file = tmp_path / "locon.safetensors"
    save_file(tensors, file)
    base, expected, predictions = predicted(pipeline.unet), predicted(by_hand), []
    for source in (file, convert(file, "diffusers")):
        with applied(pipeline, find(str(source))):
            predictions.append(predicted(pipeline.unet))
        assert (predictions[-1] - expected).norm() < 1e-5 * (expected - base).norm()
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
        layer = next(key for key in tensors if "to_q.lora_A" in key).partition("to_q")[0]
        for name in [n for n in tensors if n.startswith(f"{layer}to_q") and old in n]:
            tensor = tensors[name] if old == "lora_A" else tensors.pop(name)
            tensors[name.replace(old, new)] = tensor.clone()

    rewrite(files / "unet" / FILE, tmp_path / "bad.safetensors", change)
    with (
        pytest.raises(UserError, match=message),
        applied(pipeline, find(str(tmp_path / "bad.safetensors"))),
    ):
        pass
    assert not any(pipeline.get_list_adapters().values())
