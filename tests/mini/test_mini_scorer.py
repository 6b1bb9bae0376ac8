"""The miniature's scorer: what is shipped loads, says what its card says, and can be made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import scorer
from tools.mini import icons, scorer_data, scorer_figures, scorer_training
from tools.mini.vae import VaeSettings, build_vae

FOLDER = scorer.scorer_dir()
TINY = scorer_training.ScorerSettings(
    steps=4, batch_size=8, embed_dim=16, width=8, layers=(1, 1, 1, 1), text_width=16,
    text_layers=1, norm_batches=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, Any]:
    return scorer.load()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return scorer_training.build_tokenizer(mini.pipeline_dir() / "tokenizer")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> scorer_data.Pictures:
    """Twelve icons of random pixels, the last four hidden, through a VAE of random weights."""
    pixels = np.random.default_rng(0).integers(1, 256, (2, 12, 64, 64, 3), dtype=np.uint8)
    rows = tuple(
        icons.Icon(f"{i:05x}", f"thing {i}", ("tag",), icons.OBJECT_CATEGORIES[i % 5])
        for i in range(12)
    )
    torch.manual_seed(0)
    vae = build_vae(VaeSettings(channels=(8, 8, 8, 8)))
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    icon_set = icons.IconSet(rows, pixels[0], pixels[1])
    made = scorer_data.gather_pictures(icon_set, [8, 9, 10, 11], vae, path, seed=0)
    with pytest.raises(UserError, match="another split"):
        scorer_data.gather_pictures(icon_set, [7, 8, 9, 10], vae, path, seed=0)
    return made


def test_the_folder_is_small_and_holds_weights_in_half_precision():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".md", ".txt", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 30e6
    tensors = load_file(FOLDER / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int64}


@torch.no_grad()
def test_open_clip_loads_the_folder_by_itself(loaded: tuple[Any, Any, Any]):
    model, preprocess, tokenize = loaded
    factory: Any = open_clip  # its annotations know too many return types
    other, other_preprocess = factory.create_model_from_pretrained(f"local-dir:{FOLDER}")
    other_tokenize = open_clip.get_tokenizer(f"local-dir:{FOLDER}")
    assert type(model) is type(other) is open_clip.model.CLIP
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    image = Image.open(mini.heldout_dir() / "1f407.png")
    pixels = preprocess(image)
    assert pixels.shape == (3, 64, 64)
    assert torch.equal(pixels, other_preprocess(image))
    texts = ["a ToK icon of a rabbit, in the style of ToK", "mañana 🐇", "word " * 99]
    tokens = tokenize(texts)
    assert tokens.shape == (3, 32)
    assert torch.equal(tokens, other_tokenize(texts))
    assert torch.equal(model.encode_image(pixels[None]), other.eval().encode_image(pixels[None]))
    features = model.encode_text(tokens)
    assert torch.equal(features, other.encode_text(tokens))
    alone = torch.cat([model.encode_text(row[None]) for row in tokens])
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)


def test_pixels_are_those_of_training_and_the_words_of_the_style_are_known(loaded: Any):
    image = Image.open(mini.heldout_dir() / "1f407.png").convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(loaded[1](image)[None], scorer_training.normalize(pixels))
    tokens = loaded[2](["a ToK icon", "a TOK icon", "a flat icon"])
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_the_figures_of_the_card_come_out_again_and_are_far_above_chance():
    figures = json.loads((FOLDER / "figures.json").read_text())["figures"]
    measured = scorer_figures.measure()
    assert figures.keys() == measured.keys()
    for name, value in measured.items():  # one picture of 128 may fall to the other side of a tie
        assert value == pytest.approx(figures[name], abs=1.01 / 128), name
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("image_to_text_top1", "image_to_text_top5", "text_to_image_top1",
                 "text_to_image_top5", "caption_object_top1", "caption_style_top1"):  # fmt: skip
        assert f"{100 * figures[name]:.1f} %" in card, name
    assert measured["image_to_text_top1"] > 0.5  # chance: 1 / 128
    assert measured["image_to_text_top5"] > 0.75  # chance: 5 / 128
    assert measured["text_to_image_top1"] > 0.5
    assert measured["caption_object_top1"] > 0.3  # chance: 1 / 1570
    assert measured["matched_cosine"] > measured["mismatched_cosine"] + 0.2


def test_the_object_counts_for_more_than_the_style(loaded: tuple[Any, Any, Any]):
    model, preprocess, tokenize = loaded
    images, labels = scorer_figures.read_heldout()
    shifted = labels[1:] + labels[:1]
    forms = (scorer_data.FLAT_FORM, scorer_data.SOLID_FORM)
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in images])
        seen = model.encode_image(pixels, normalize=True)
        right_object, right_style = (
            (seen * model.encode_text(tokenize([form.format(label=name) for name in names]),
                                      normalize=True)).sum(dim=1)
            for form, names in zip(forms, (labels, shifted), strict=True)
        )  # fmt: skip
    assert float((right_object > right_style).float().mean()) > 0.8


def test_the_bank_holds_each_label_once_in_each_style():
    bank = scorer.captions()
    assert len(bank) == len(set(bank)) == 2 * 1570
    labels = scorer_figures.read_heldout()[1]
    for form in (scorer_data.SOLID_FORM, scorer_data.FLAT_FORM):
        assert {form.format(label=label) for label in labels} <= set(bank)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "captions.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    for path in FOLDER.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=name):
        scorer.captions(tmp_path) if name == "captions.txt" else scorer.load(tmp_path)


def test_no_step_can_show_a_hidden_picture(pictures: scorer_data.Pictures):
    assert not pictures.solid[8:].any()
    assert pictures.solid[:8].any(axis=(1, 2, 3, 4)).all()
    assert pictures.flat.any(axis=(1, 2, 3, 4)).all()
    words = ("ToK", "3D", *icons.VARIANTS)
    hidden = tuple(f"thing {i}" for i in range(8, 12))
    styled: set[str] = set()
    for step in range(30):
        images, texts = scorer_data.draw_examples(pictures, "test", 0, step, 12)
        assert images.shape == (12, 3, 64, 64)
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
        styled |= {text for text in texts if any(word in text for word in words)}
    assert len(styled) > 30
    assert not [text for text in styled if any(text.endswith(name) for name in hidden)]
    assert not [text for text in styled if any(f"{name}," in text for name in hidden)]


def test_a_batch_repeats_icons_only_in_two_styles(pictures: scorer_data.Pictures):
    pairs = int(scorer_data.PAIR_SHARE * 12)
    assert pairs == 1
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        rows = scorer_data.draw_rows(pictures, 12, generator)
        assert len(set(rows)) == len(rows) == 12
        assert len({index for index, _ in rows}) == 12 - pairs
        assert [style for _, style in rows[: 2 * pairs]] == ["solid", "flat"] * pairs
        hidden = [style for index, style in rows if pictures.hidden[index]]
        assert hidden
        assert "solid" not in hidden
        texts = scorer_data.draw_examples(pictures, "test", 1, step, 12)[1]
        assert len(set(texts)) == 12
        assert sum("tag" in text for text in texts) <= 1  # all twelve share this tag
        for text in texts[: 2 * pairs]:  # without its style it would be right for both pictures
            assert any(f"a {word} icon" in text for word in ("ToK", "3D", *icons.VARIANTS))


def test_captions_name_the_style_of_their_picture():
    icon = icons.Icon("1f407", "rabbit", (), "animals & nature")
    plain = {"an icon of a rabbit", "a rabbit", "rabbit"}
    seen = set()
    for draw in np.linspace(0, 0.999, 50):
        solid, sepia = (
            scorer_data.caption(icon, style, [0.9, 0.0, draw], set())
            for style in ("solid", "sepia")
        )
        assert ("sepia" in sepia) == (sepia not in plain)
        assert (" ToK " in solid or " 3D " in solid) == (solid not in plain)
        assert scorer_data.caption(icon, "flat", [0.9, 0.0, draw], {"rabbit"}) not in plain
        assert scorer_data.caption(icon, "flat", [0.9, 0.0, draw], set(), hidden=True) in plain
        seen |= {solid, sepia}
    assert plain < seen
    for forms in (scorer_data.SOLID_FORMS, scorer_data.OTHER_FORMS):
        assert sum(share for share, _ in forms) == pytest.approx(1)


def test_augmentation_leaves_letters_unmirrored():
    images = torch.ones(64, 3, 64, 64)
    images[:, :, :, :32] = 0  # black on the left
    for may, expected in ((False, 0), (True, 32)):
        result = scorer_data.augment(
            images, torch.full((64,), may), torch.Generator().manual_seed(0)
        )
        mirrored = result[..., 10:22].mean(dim=(1, 2, 3)) > result[..., 42:54].mean(dim=(1, 2, 3))
        assert int(mirrored.sum()) == pytest.approx(expected, abs=12 if may else 0)


def test_training_moves_both_towers_and_resumes_exactly(
    tmp_path: Path, pictures: scorer_data.Pictures, tokenizer: Any
):
    for name, stops in (("once", [None]), ("killed", [2, None])):
        (tmp_path / name).mkdir()
        for stop in stops:
            trained, _ = scorer_training.train_scorer(
                pictures, tokenizer, TINY, 0, tmp_path / name, stop_after=stop
            )
        scorer_training.export(
            tmp_path / name / "scorer", trained, tokenizer, TINY, ["rabbit", "cloud"]
        )
    for file in ("scorer.safetensors", "scorer/open_clip_model.safetensors"):
        once, killed = (load_file(tmp_path / name / file) for name in ("once", "killed"))
        assert once.keys() == killed.keys()
        for key, value in once.items():
            assert torch.equal(value, killed[key]), key
    assert len(scorer.captions(tmp_path / "once" / "scorer")) == 4
    exported, _, tokenize = scorer.load(tmp_path / "once" / "scorer")
    torch.manual_seed(0)
    before = open_clip.model.CLIP(**scorer_training.model_config(TINY, tokenizer)).state_dict()
    after = trained.state_dict()
    for key in ("visual.conv1.weight", "text_projection", "token_embedding.weight", "logit_scale"):
        assert not torch.equal(before[key], after[key]), key
    assert int(after["visual.bn1.num_batches_tracked"]) == TINY.norm_batches
    models: Any = (exported, trained)
    ids = tokenize(["a ToK icon of a rabbit"])
    half, full = (model.encode_text(ids) for model in models)
    torch.testing.assert_close(half, full, atol=2e-3, rtol=2e-3)
    with pytest.raises(UserError, match="other settings"):
        scorer_training.train_scorer(
            pictures, tokenizer, replace(TINY, steps=5), 0, tmp_path / "once"
        )


@pytest.mark.parametrize("flag", ["--steps", "--batch_size", "--threads"])
def test_the_script_refuses_a_number_below_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
):
    output = tmp_path / "out"
    assert scorer_training.main(["--output_dir", str(output), flag, "0"]) == 2
    error = capsys.readouterr().err
    assert flag in error
    assert "Traceback" not in error
    assert not output.exists()
