"""The embedded miniature: its split, the shipped icon folders, its tokenizer, and that pretraining
resumes exactly.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from bilora_diffusion import mini
from bilora_diffusion.image.config import parse
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.script import heldout_images
from tools.mini import flow, icons, text2image, trainer, vae
from tools.mini.tokenizer import RARE_WORD, build_tokenizer

SHIPPED = {"train": (mini.train_dir(), 23), "heldout": (mini.heldout_dir(), 128)}
ANIMALS = {
    "animals": (mini.animals_train_dir(), 12),
    "held-out animals": (mini.animals_heldout_dir(), 64),
}


def read_metadata(folder: Path) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def invented_icons(count: int) -> tuple[icons.Icon, ...]:
    """Icons in every object category, some with labels that are too long, and the subjects of Table
    4.
    """
    labels = [
        *icons.SUBJECTS,
        *(f"thing {i}" if i % 5 else f"a very long name {i}" for i in range(count - 6)),
    ]
    groups = (*icons.OBJECT_CATEGORIES, "symbols")
    return tuple(
        icons.Icon(f"{i:05x}", label, ("tag",), groups[0 if i < 6 else i % 6])
        for i, label in enumerate(labels)
    )


def invented_set(count: int = 8) -> icons.IconSet:
    pixels = np.random.default_rng(0).integers(
        0, 256, (2, count, icons.SIZE, icons.SIZE, 3), dtype=np.uint8
    )
    return icons.IconSet(invented_icons(count), pixels[0], pixels[1])


def test_split_is_deterministic_and_disjoint():
    every = invented_icons(400)
    train, heldout = icons.split(every)
    assert (train, heldout) == icons.split(every)
    assert (len(train), len(heldout)) == (23, 128)
    assert len({*train, *heldout}) == 151
    assert [every[i].label for i in heldout[:6]] == list(icons.SUBJECTS)
    assert all(every[i].is_object and len(every[i].label.split()) <= 3 for i in train + heldout)
    assert icons.split(every, seed=1) != (train, heldout)


def test_split_does_not_depend_on_the_order_of_the_icons():
    every = invented_icons(400)
    backwards = every[::-1]
    for forward, reverse in zip(icons.split(every), icons.split(backwards), strict=True):
        assert [every[i].codepoint for i in forward] == [backwards[i].codepoint for i in reverse]


@pytest.mark.parametrize("name", SHIPPED | ANIMALS)
def test_shipped_folder(name: str):
    folder, count = (SHIPPED | ANIMALS)[name]
    rows = read_metadata(folder)
    assert len({row["codepoint"] for row in rows}) == count
    assert {row["file_name"] for row in rows} == {path.name for path in folder.glob("*.png")}
    for row in rows:
        assert row["prompt"] == f"a TOK icon of a {row['label']}, in the style of TOK"
        assert row["file_name"] == f"{row['codepoint']}.png"
        with Image.open(folder / row["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


def test_shipped_folders_are_disjoint_and_begin_with_the_subjects():
    train, heldout = (read_metadata(folder) for folder, _ in SHIPPED.values())
    assert not {row["codepoint"] for row in train} & {row["codepoint"] for row in heldout}
    subjects = ["rabbit", "cloud", "lion", "droplet", "frog", "sun"]
    assert [row["label"] for row in heldout[:6]] == subjects


def test_the_animals_are_disjoint_and_held_out_ones_are_what_is_drawn_for_show():
    train, heldout = (read_metadata(folder) for folder, _ in ANIMALS.values())
    assert not {row["codepoint"] for row in train} & {row["codepoint"] for row in heldout}
    cfg = parse(["--dataset", "mini-animals"])
    assert (cfg.pretrained_model_name_or_path, cfg.caption_column) == ("mini", "prompt")
    assert cfg.validation_dataset == "mini-animals-heldout"
    assert set(cfg.validation_prompts) < {row["prompt"] for row in heldout}
    both = [open_images(name) for name in ("mini-animals", "mini-animals-heldout")]
    assert list(map(len, both)) == [12, 64]
    halves = [
        heldout_images(parse(["--dataset", "mini-animals", "--validation_part", part]))
        for part in ("1/2", "2/2")
    ]
    names = [half.name(i) for half in halves if half for i in range(len(half))]
    assert sorted(names) == sorted(row["file_name"] for row in heldout)


def test_written_folder_pairs_labels_and_pictures(tmp_path: Path):
    icon_set = invented_set()
    icons.write_image_folder(tmp_path, icon_set, [5, 2])
    rows = read_metadata(tmp_path)
    assert [row["label"] for row in rows] == [icon_set.icons[5].label, icon_set.icons[2].label]
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / rows[0]["file_name"])), icon_set.solid[5]
    )


def test_recolour_keeps_shape_and_refuses_unknown_variants():
    pixels = invented_set().flat
    for variant in icons.VARIANTS:
        changed = icons.recolour(pixels, variant)
        assert (changed.shape, changed.dtype) == (pixels.shape, np.uint8)
    with pytest.raises(ValueError, match="neon"):
        icons.recolour(pixels, "neon")


def small_tokenizer() -> CLIPTokenizer:
    return build_tokenizer(
        [icon.label for icon in invented_icons(8)] + ["stock", "took"], merges=60
    )


@pytest.mark.parametrize("source", ["built", "shipped"])
def test_tokenizer_takes_any_string_and_has_the_rare_word_whatever_its_case(source: str):
    tokenizer = (
        small_tokenizer()
        if source == "built"
        else CLIPTokenizer.from_pretrained(mini.pipeline_dir() / "tokenizer")
    )
    assert tokenizer.tokenize("a TOK icon") == tokenizer.tokenize("a tok icon")
    assert tokenizer.tokenize("TOK") == [RARE_WORD + "</w>"]
    generator = random.Random(0)
    ranges = [(0x21, 0x250), (0x370, 0x600), (0x900, 0xA00), (0x4E00, 0x4F00)]
    ranges += [(0x1F300, 0x1F700), (0xE000, 0xE100)]
    for _ in range(200):
        text = "".join(
            chr(generator.randrange(*generator.choice(ranges)))
            for _ in range(generator.randrange(1, 12))
        )
        ids = tokenizer(text, truncation=False).input_ids
        assert tokenizer.eos_token_id not in ids[1:-1], f"{text!r} has an unknown piece"
        decoded = str(tokenizer.decode(ids, skip_special_tokens=True))
        expected = tokenizer.backend_tokenizer.normalizer.normalize_str(
            unicodedata.normalize("NFC", text)
        )
        assert "".join(decoded.split()) == "".join(expected.split())


def test_captions_cover_their_forms_and_drop_a_tenth():
    icon = icons.Icon("1f407", "rabbit", ("bunny",), "animals & nature")
    generator = random.Random(0)
    texts = [
        text2image.caption(icon, "night", [generator.random() for _ in range(4)])
        for _ in range(4000)
    ]
    assert 0.08 < texts.count("") / len(texts) < 0.12
    for _, form in text2image.CAPTIONS:
        assert form.format(style="night", label="rabbit") in texts
        assert form.format(style="night", label="bunny") in texts
    assert not any(RARE_WORD in text for text in texts)


SMALL = text2image.TextToImageSettings(steps=4, batch_size=4, unet_channels=(32, 64), text_width=32)
SMALL_FLOW = flow.FlowSettings(steps=4, settle_steps=1, batch_size=4, width=24, heads=2, layers=1)


def train_small(stage: str, folder: Path, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Four steps of a stage in a tiny shape; the checkpoint it leaves."""
    icon_set = invented_set()
    folder.mkdir(exist_ok=True)
    if stage == "vae":
        settings = vae.VaeSettings(steps=4, batch_size=4, channels=(8, 8, 8, 8))
        vae.train_vae(icon_set, [0, 1], settings, 3, folder, stop_after=stop_after)
        return load_file(folder / f"{stage}.safetensors")
    shape = (len(icon_set.icons), len(icons.VARIANTS), 2, 8, 8, 8)
    latents = text2image.Latents(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.ones(shape), 1.0
    )
    if stage == "flow":
        flow.train(icon_set, latents, SMALL_FLOW, 3, folder, stop_after)
    else:
        settle = text2image.SettleSettings(steps=2)
        text2image.train_text2image(
            icon_set.icons, latents, small_tokenizer(), SMALL, 3, folder,
            stop_after=stop_after, settle=settle,
        )  # fmt: skip
    return load_file(folder / f"{stage}.safetensors")


@pytest.mark.parametrize("stage", ["vae", "text2image", "flow"])
def test_killed_run_resumes_bit_for_bit(stage: str, tmp_path: Path):
    whole = train_small(stage, tmp_path / "whole")
    interrupted = train_small(stage, tmp_path / "parts", stop_after=2)
    resumed = train_small(stage, tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert any(not torch.equal(interrupted[name], whole[name]) for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_the_pipeline_of_mini_flow_draws_along_the_velocity_that_was_trained():
    """One Euler step from noise; and whatever stands in T5's place is zero, as in training."""
    read = flow.Conditioner(mini.pipeline_dir())
    torch.manual_seed(0)
    model = flow.transformer(SMALL_FLOW, sum(e.config.hidden_size for e in read.encoders))
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)  # it begins at zero
    autoencoder: Any = AutoencoderKL.from_pretrained(
        mini.pipeline_dir() / "vae", torch_dtype=torch.float32
    )
    autoencoder.register_to_config(shift_factor=0.0)
    pipeline = flow.pipeline_of(model.eval(), read, autoencoder)
    noise: Any = torch.randn(1, 8, 8, 8)
    text = "a flat icon of a rabbit"
    drawn: Any = pipeline(
        text, latents=noise, num_inference_steps=1, guidance_scale=0, output_type="latent",
        max_sequence_length=16,
    )  # fmt: skip
    states, pooled = read([text])
    velocity = model(
        noise,
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=torch.cat([states, torch.zeros(1, 16, states.shape[-1])], dim=1),
        pooled_projections=pooled,
    ).sample
    assert velocity.abs().mean() > 0.01
    torch.testing.assert_close(drawn.images, noise - velocity, rtol=1e-4, atol=1e-5)
    # the loss is zero for what the velocity says itself
    clean = (noise - velocity).detach()
    loss = flow.velocity_loss(model, (states, pooled), 16, (clean, noise, torch.ones(1)))
    assert float(loss) < 1e-8


def test_rare_token_keeps_its_first_embedding(tmp_path: Path):
    stored = train_small("text2image", tmp_path)
    tokenizer = small_tokenizer()
    name = "model/text_encoder.embeddings.token_embedding.weight"
    name = name if name in stored else name.replace("embeddings", "text_model.embeddings")
    torch.manual_seed(3)
    model = text2image.TextToImage(SMALL, tokenizer)
    fresh = dict(model.named_parameters())[name.removeprefix("model/")]
    rare = tokenizer.convert_tokens_to_ids(RARE_WORD + "</w>")
    changed = (stored[name] != fresh).any(dim=1)
    assert changed.any()
    assert not changed[rare]


def test_other_settings_and_a_loss_that_is_not_finite_keep_the_checkpoint(tmp_path: Path):
    module = torch.nn.Linear(2, 2)
    plan = trainer.Plan(steps=3, learning_rate=1e-3, decay_fraction=0.5, ema_decay=0.9)
    path = tmp_path / "stage.safetensors"

    def fit(settings: dict[str, object], loss: Callable[[], torch.Tensor], **more: Any) -> None:
        trainer.fit(module, lambda step: loss(), plan, path, settings, **more)

    fit({"width": 1}, lambda: module.weight.square().mean(), stop_after=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        fit({"width": 2}, lambda: module.weight.square().mean())
    with pytest.raises(FloatingPointError, match="stage: the loss is nan at step 1"):
        fit({"width": 1}, lambda: module.weight.sum() * float("nan"))
    assert path.read_bytes() == before


def test_learning_rate_warms_up_stays_and_decays_to_nearly_zero():
    plan = trainer.Plan(
        steps=1000, learning_rate=1.0, decay_fraction=0.3, ema_decay=0.999, warmup_steps=100
    )
    rates = [trainer.learning_rate_at(step, plan) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert set(rates[100:700]) == {1.0}
    assert all(earlier > later for earlier, later in pairwise(rates[700:]))
    assert rates[-1] < 1e-3
