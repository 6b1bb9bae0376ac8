"""The packaged miniatures and their scorer match their cards, and only paired runs are compared."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.core.files import hash_of_file
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.script import heldout_images
from bilora_diffusion.mini import scorer
from bilora_diffusion.mini.colors import color_difference
from bilora_diffusion.train.variants import require_paired

ROOT = Path(mini.__file__).parent
ICON_COUNTS = {"mini": 23, "mini-heldout": 128, "mini-animals": 12, "mini-animals-heldout": 64}
SIZE_LIMITS = {mini.pipeline_dir(): 44e6, mini.flow_dir(): 30e6, scorer.scorer_dir(): 30e6}
"""Maximum size of each packaged model, in bytes."""

STYLED_CAPTION, FLAT_CAPTION = "a ToK icon of a {}, in the style of ToK", "a flat icon of a {}"


def read_metadata(name):
    lines = (mini.FOLDERS[name] / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def column(rows, name):
    return [row[name] for row in rows]


@pytest.mark.parametrize("name", ICON_COUNTS)
def test_a_folder_of_icons_is_complete(name):
    rows = read_metadata(name)
    count = ICON_COUNTS[name]
    assert len(set(column(rows, "codepoint"))) == len(open_images(name)) == count
    folder = mini.FOLDERS[name]
    assert set(column(rows, "file_name")) == {path.name for path in folder.glob("*.png")}
    for row in rows:
        assert row["prompt"] == f"a TOK icon of a {row['label']}, in the style of TOK"
        with Image.open(folder / row["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize("name", ["mini", "mini-animals"])
def test_held_out_icons_are_not_training_icons(name):
    heldout = read_metadata(f"{name}-heldout")
    assert set(column(heldout, "codepoint")).isdisjoint(column(read_metadata(name), "codepoint"))
    cfg = resolve(["--dataset", name])
    assert (cfg.pretrained_model_name_or_path, cfg.caption_column) == ("mini", "prompt")
    assert cfg.validation_dataset == f"{name}-heldout"
    assert set(cfg.validation_prompts) < set(column(heldout, "prompt"))

    heldout_set = heldout_images(cfg)
    assert heldout_set is not None
    assert [entry.name for entry in heldout_set.entries] == column(heldout, "file_name")
    if name == "mini":  # the subjects of the paper's Table 4
        subjects = ["rabbit", "cloud", "lion", "droplet", "frog", "sun"]
        assert column(heldout[:6], "label") == subjects


def in_duotone(pixels):
    """Map pixels (h, w, 3) to the shades between two colors."""
    brightness = pixels @ [0.299, 0.587, 0.114] / 255  # luma of ITU-R BT.601, as in Pillow's "L"
    dark, light = np.array([30, 20, 110]), np.array([255, 240, 200])
    return dark + brightness[..., None] * (light - dark)


COLOR_MAPS = {
    "mini-duotone": in_duotone,
    "mini-gray": lambda pixels: 255 * np.stack([pixels @ [0.299, 0.587, 0.114] / 255] * 3, axis=-1),
    "mini-pastel": lambda pixels: 255 - 0.4 * (255 - pixels),
    "mini-animals-duotone": in_duotone,
}


@pytest.mark.parametrize("name", mini.COLORED)
def test_colored_data_sets_are_the_same_images_in_other_colors(name):
    original, _ = mini.COLORED[name]
    plain = open_images(f"{original}-heldout")
    cfg = resolve(["--dataset", name])
    assert (cfg.pretrained_model_name_or_path, cfg.caption_column) == ("mini", "prompt")
    images = heldout_images(cfg)
    assert images is not None
    assert images.label == f"{name}-heldout"
    assert [entry.name for entry in images.entries] == [entry.name for entry in plain.entries]
    assert images.fingerprint() != plain.fingerprint()
    expected_pixels = COLOR_MAPS[name](np.asarray(plain.image(0), dtype=float))
    # Brightness and result are both rounded to whole numbers.
    assert np.abs(np.asarray(images.image(0)) - expected_pixels).max() <= 2


def test_the_weights_have_the_hashes_of_their_card_and_half_precision():
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    card_hashes = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    hashes = {}
    for path in ROOT.rglob("*.safetensors"):
        hashes[path.relative_to(ROOT).as_posix()] = hash_of_file(path)
        dtypes = {tensor.dtype for tensor in load_file(path).values()}
        assert dtypes <= {torch.float16, torch.int64}  # int64: position ids
    assert hashes == card_hashes
    for folder, limit in SIZE_LIMITS.items():
        assert sum(path.stat().st_size for path in folder.rglob("*")) < limit


@pytest.fixture(scope="module")
def clip():
    """Return the scorer's model, image transform and tokenizer."""
    return scorer.load()


def embed_images(clip, images):
    model, preprocess, _ = clip
    return model.encode_image(torch.stack([preprocess(image) for image in images]), True)


def embed_captions(clip, captions):
    model, _, tokenizer = clip
    return model.encode_text(tokenizer(captions), True)


@pytest.mark.slow
@torch.no_grad()
def test_mini_flow_loads_in_diffusers_and_generates_what_the_prompts_describe(clip):
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        mini.flow_dir(), dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    labels = column(read_metadata("mini-heldout")[:24], "label")
    prompts = [FLAT_CAPTION.format(label) for label in labels]
    images = pipeline(
        prompts,
        guidance_scale=4.0,
        num_inference_steps=20,
        height=64,
        width=64,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(number) for number in range(24)],
    ).images
    similarity = embed_images(clip, images) @ embed_captions(clip, prompts).T
    assert top1_accuracy(similarity) > 0.9  # chance: 1 / 24


def top1_accuracy(similarity):
    """Return the share of rows whose largest entry is on the diagonal."""
    return float((similarity.argmax(dim=1) == torch.arange(len(similarity))).float().mean())


@torch.no_grad()
def test_open_clip_alone_loads_the_scorer(clip):
    factory: Any = open_clip  # its annotations have too many return types
    source = f"local-dir:{scorer.scorer_dir()}"
    model, preprocess = factory.create_model_from_pretrained(source)
    scorer_model, scorer_preprocess, tokenizer = clip
    image = Image.open(mini.heldout_dir() / "1f407.png")
    assert torch.equal(scorer_preprocess(image), preprocess(image))
    # accents, characters that are not letters, and more tokens than the model's context
    tokens = tokenizer([STYLED_CAPTION.format("rabbit"), "mañana 🐇", "word " * 99])
    assert torch.equal(scorer_model.encode_text(tokens), model.eval().encode_text(tokens))


@pytest.mark.slow
@torch.no_grad()
def test_the_accuracies_on_the_scorers_card_are_reproduced(clip):
    rows = read_metadata("mini-heldout")
    images = [Image.open(mini.heldout_dir() / row["file_name"]) for row in rows]
    image_embeddings = embed_images(clip, images)
    styled = [STYLED_CAPTION.format(row["label"]) for row in rows]
    flat = [FLAT_CAPTION.format(row["label"]) for row in rows]
    # The scorer's training captions: two for each object, styled and flat.
    bank = scorer.captions()
    assert len(set(bank)) == len(bank) == 2 * 1570
    assert set(styled + flat) <= set(bank)

    similarity = image_embeddings @ embed_captions(clip, styled).T  # (images, captions)
    best_in_bank = (image_embeddings @ embed_captions(clip, bank).T).argmax(dim=1)
    right_objects = right_styles = 0
    for number, index in enumerate(best_in_bank.tolist()):
        right_objects += bank[index] in (styled[number], flat[number])
        right_styles += " ToK " in bank[index]
    measured = {
        "image_to_text_top1": top1_accuracy(similarity),
        "text_to_image_top1": top1_accuracy(similarity.T),
        "caption_object_top1": right_objects / 128,
        "caption_style_top1": right_styles / 128,
    }
    figures = json.loads((scorer.scorer_dir() / "figures.json").read_text())["figures"]
    card = (scorer.scorer_dir() / "README.md").read_text(encoding="utf-8")
    for name, value in measured.items():
        # If two captions are equally near, one of the 128 images may count differently.
        assert value == pytest.approx(figures[name], abs=1.01 / 128), name
        assert f"{100 * figures[name]:.1f} %" in card, name


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "captions.txt"])
def test_a_missing_file_of_the_scorer_is_named(tmp_path, name):
    for path in scorer.scorer_dir().iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=name):
        scorer.captions(tmp_path) if name == "captions.txt" else scorer.load(tmp_path)


def write_run(folder, digests):
    """Write a run's metrics with a batch digest for each step; return the run's folder."""
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as metrics:
        for step, digest in enumerate(digests, start=1):
            print(json.dumps({"step": step, "digest": digest}), file=metrics)
    return folder


@pytest.mark.parametrize(("digests", "step"), [("xyz", None), ("xyw", 3), ("xy", 3), ("xyzx", 4)])
def test_only_runs_with_equal_digests_are_compared(tmp_path, digests, step):
    pair = [write_run(tmp_path / "a", "xyz"), write_run(tmp_path / "b", digests)]
    if step is None:
        assert require_paired(pair) == 3
    else:
        with pytest.raises(TrainingError, match=f"step {step}"):
            require_paired(pair)


def test_the_color_difference_depends_on_colors_and_not_on_detail():
    black, white, gray = (Image.new("RGB", (64, 64), color) for color in ("black", "white", "gray"))
    columns = np.zeros((64, 64, 3), np.uint8)
    columns[:, ::2] = 255
    assert color_difference(white, black) == 1
    assert color_difference(black, black) == 0
    assert color_difference(Image.fromarray(columns), gray) < 0.01
