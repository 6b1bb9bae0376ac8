"""Which layers a word of --lora_layers stands for, in each kind of model."""

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

BOTH = {f"ff{c}.net.#{p}" for c in ("", "_context") for p in ("", ".proj")}
FEED_FORWARD = {
    SDXL: {"ff.net.#.proj", "ff.net.#"},
    "StableDiffusion3Pipeline": BOTH,
    "FluxPipeline": BOTH | {f"single_transformer_blocks.#.proj_{p}" for p in ("mlp", "out")},
    "Flux2KleinPipeline": {f"ff{c}.linear_{p}" for c in ("", "_context") for p in ("in", "out")},
    "ZImagePipeline": {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
    "QwenImagePipeline": {f"{c}_mlp.net.#{p}" for c in ("img", "txt") for p in ("", ".proj")},
    "Krea2Pipeline": {"ff.gate", "ff.up", "ff.down"},
    "Lumina2Pipeline": {f"feed_forward.linear_{n}" for n in "123"},
}
"""Ends of the layers' names, with # for numbers."""
each_kind = pytest.mark.parametrize("kind", [SDXL, *FILES])


def pipeline(kind):
    return load_pipeline("mini", dtype=torch.float32) if kind == SDXL else make_pipeline(kind)


def layers(pipeline, *words):
    model = family_of(pipeline).model(pipeline)
    spec = AdapterSpec(target_modules=select_layers(words, family_of(pipeline), model))
    return set(target_layers(model, spec))


@each_kind
def test_groups_and_names(kind):
    base = pipeline(kind)
    model: nn.Module = family_of(base).model(base)
    module_types = {name: type(module) for name, module in model.named_modules()}
    linear = {name for name, module_type in module_types.items() if module_type is nn.Linear}
    inner = {
        name
        for name, module_type in module_types.items()
        if module_type is nn.Conv2d and re.search(r"\.\d+\.", name)
    }
    attention, feed_forward = layers(base, "attention"), layers(base, "feed-forward")
    ends = tuple(f".{end}" for end in FEED_FORWARD[kind])
    plain = {name: re.sub(r"(?<=\.)\d+(?=\.|$)", "#", f".{name}") for name in linear}
    assert feed_forward == {name for name in linear if plain[name].endswith(ends)}
    assert len({end for end in ends for n in feed_forward if plain[n].endswith(end)}) == len(ends)
    assert attention & feed_forward == set()
    assert layers(base, "attention", "feed-forward") == attention | feed_forward
    assert layers(base, "all-linear") == linear
    assert layers(base, "all") == linear | inner
    assert layers(base, "feed-forward", "to_k") > {n for n in linear if n.endswith(".to_k")}
    if kind == SDXL:
        assert layers(base, "convolutions") == inner
        assert set(adaptable(model, convolutions=True)) == inner | {"conv_in", "conv_out"}
        assert layers(base, "conv_in", "resnets.0.conv1") > {"conv_in"}
        return
    with pytest.raises(UserError, match=r"convolutions.*no such layer.*all-linear"):
        layers(base, "convolutions")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("to_qq", 'did you mean "to_q"'),
        ("resnets.0.con1", 'did you mean "resnets.0.conv1"'),
        ("xyz", f"give {', '.join(LAYER_GROUPS)}, or the ends"),
    ],
)
def test_a_word_that_is_nothing_beside_one_that_is(word, sentence):
    with pytest.raises(UserError, match=f'--lora_layers "{word}".*{sentence}'):
        layers(pipeline(SDXL), "to_k", word)
