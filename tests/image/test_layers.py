"""The layers that each word of --lora_layers selects in each family of models."""

import re

import pytest
import torch
from torch import nn

from bilora_diffusion.adapters import AdapterSpec, adaptable, target_layers
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.values import LAYER_GROUPS
from bilora_diffusion.image.families import SDXL, family_of
from bilora_diffusion.image.pipeline import load_pipeline, select_layers
from tests.image.tiny import FILES, make_pipeline

STREAMS = "ff.net.# ff.net.#.proj ff_context.net.# ff_context.net.#.proj"
SINGLE = "single_transformer_blocks.#.proj_mlp single_transformer_blocks.#.proj_out"
FEED_FORWARD = {
    SDXL: "ff.net.#.proj ff.net.#",
    "StableDiffusion3Pipeline": STREAMS,
    "FluxPipeline": f"{STREAMS} {SINGLE}",
    "Flux2KleinPipeline": "ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out",
    "ZImagePipeline": "feed_forward.w1 feed_forward.w2 feed_forward.w3",
    "QwenImagePipeline": "img_mlp.net.# img_mlp.net.#.proj txt_mlp.net.# txt_mlp.net.#.proj",
    "Krea2Pipeline": "ff.gate ff.up ff.down",
    "Lumina2Pipeline": "feed_forward.linear_1 feed_forward.linear_2 feed_forward.linear_3",
}
"""Endings of the layers' names, with # in place of numbers."""


def pipeline(kind):
    return load_pipeline("mini", dtype=torch.float32) if kind == SDXL else make_pipeline(kind)


def layers(pipeline, *words):
    model = family_of(pipeline).model(pipeline)
    spec = AdapterSpec(target_modules=select_layers(words, family_of(pipeline), model))
    return set(target_layers(model, spec))


def feed_forward_end(kind, name):
    """Return the ending from `FEED_FORWARD` that a layer's name has, or None."""
    # "blocks.3.ff.net.0" becomes ".blocks.#.ff.net.#".
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", f".{name}")
    for end in FEED_FORWARD[kind].split():
        if pattern.endswith(f".{end}"):
            return end
    return None


@pytest.mark.parametrize("kind", [SDXL, *FILES])
def test_groups_and_names_select_the_expected_layers(kind):
    base = pipeline(kind)
    model: nn.Module = family_of(base).model(base)
    linear = set()
    inner_convolutions = set()
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            linear.add(name)
        if type(module) is nn.Conv2d and re.search(r"\.\d+\.", name):  # in a numbered block
            inner_convolutions.add(name)
    attention, feed_forward = layers(base, "attention"), layers(base, "feed-forward")
    assert feed_forward == {name for name in linear if feed_forward_end(kind, name)}
    used_ends = {feed_forward_end(kind, name) for name in feed_forward}
    assert used_ends == set(FEED_FORWARD[kind].split())
    assert attention.isdisjoint(feed_forward)
    assert layers(base, "attention", "feed-forward") == attention | feed_forward
    assert layers(base, "all-linear") == linear
    assert layers(base, "all") == linear | inner_convolutions
    keys = {name for name in linear if name.endswith(".to_k")}
    assert layers(base, "feed-forward", "to_k") == feed_forward | keys
    if kind == SDXL:
        assert layers(base, "convolutions") == inner_convolutions
        outer_convolutions = {"conv_in", "conv_out"}
        assert set(adaptable(model, convolutions=True)) == inner_convolutions | outer_convolutions
        assert layers(base, "conv_in", "resnets.0.conv1") > {"conv_in"}
    else:
        with pytest.raises(UserError, match=r"convolutions.*no such layer.*all-linear"):
            layers(base, "convolutions")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("to_qq", 'did you mean "to_q"'),
        ("resnets.0.con1", 'did you mean "resnets.0.conv1"'),
        ("xyz", f"give {', '.join(LAYER_GROUPS)}, or endings"),
    ],
)
def test_an_unknown_word_is_refused_together_with_a_known_one(word, sentence):
    with pytest.raises(UserError, match=f'--lora_layers "{word}".*{sentence}'):
        layers(pipeline(SDXL), "to_k", word)
