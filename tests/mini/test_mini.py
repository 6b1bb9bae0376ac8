"""The embedded miniatures are as good as their cards say; the demo compares what saw the same."""

import hashlib
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
from bilora_diffusion.demo import difference, require_paired
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.script import heldout_images
from bilora_diffusion.mini import scorer
from examples import own_loop

ROOT = Path(mini.__file__).parent
ICONS = {
    "mini": (mini.train_dir(), 23),
    "mini-heldout": (mini.heldout_dir(), 128),
    "mini-animals": (mini.FOLDERS["mini-animals"], 12),
    "mini-animals-heldout": (mini.FOLDERS["mini-animals-heldout"], 64),
}
SIZES = {mini.pipeline_dir(): 44e6, mini.flow_dir(): 30e6, scorer.scorer_dir(): 30e6}
SOLID, FLAT = "a ToK icon of a {}, in the style of ToK", "a flat icon of a {}"


def read_metadata(name):
    lines = (ICONS[name][0] / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ICONS)
def test_a_folder_of_icons_is_whole(name):
    folder, count = ICONS[name]
    rows = read_metadata(name)
    assert len({row["codepoint"] for row in rows}) == len(open_images(name)) == count
    assert {row["file_name"] for row in rows} == {path.name for path in folder.glob("*.png")}
    for row in rows:
        assert row["prompt"] == f"a TOK icon of a {row['label']}, in the style of TOK"
        with Image.open(folder / row["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize("name", ["mini", "mini-animals"])
def test_held_out_icons_are_others_and_come_in_two_halves(name):
    train, heldout = read_metadata(name), read_metadata(f"{name}-heldout")
    assert not {row["codepoint"] for row in train} & {row["codepoint"] for row in heldout}
    cfg = resolve(["--dataset", name])
    assert (cfg.pretrained_model_name_or_path, cfg.caption_column) == ("mini", "prompt")
    assert cfg.validation_dataset == f"{name}-heldout"
    assert set(cfg.validation_prompts) < {row["prompt"] for row in heldout}
    parts = [resolve(["--dataset", name, "--validation_part", part]) for part in ("1/2", "2/2")]
    names = [entry.name for half in map(heldout_images, parts) if half for entry in half.entries]
    assert sorted(names) == sorted(row["file_name"] for row in heldout)
    if name == "mini":  # those of the paper's Table 4
        subjects = ["rabbit", "cloud", "lion", "droplet", "frog", "sun"]
        assert [row["label"] for row in heldout[:6]] == subjects


def test_colored_sets_are_the_icons_in_other_colors():
    plain = open_images("mini-heldout")
    rabbit = np.asarray(plain.image(0), dtype=float)  # (h, w, 3)
    brightness = rabbit @ [0.299, 0.587, 0.114] / 255
    dark, light = np.array([30, 20, 110]), np.array([255, 240, 200])
    expected = {
        "mini-duotone": dark + brightness[..., None] * (light - dark),
        "mini-gray": 255 * np.stack([brightness] * 3, axis=-1),
        "mini-pastel": 255 - 0.4 * (255 - rabbit),
    }
    hashes = {plain.fingerprint()}
    for name, pixels in expected.items():
        cfg = resolve(["--dataset", name])
        assert (cfg.pretrained_model_name_or_path, cfg.caption_column) == ("mini", "prompt")
        images = heldout_images(cfg)
        assert images is not None
        assert images.label == f"{name}-heldout"
        assert [entry.name for entry in images.entries] == [e.name for e in plain.entries]
        assert np.abs(np.asarray(images.image(0)) - pixels).max() <= 2
        hashes.add(images.fingerprint())
    assert len(hashes) == 4
    assert set(expected) == set(mini.COLORED)


def test_the_weights_are_those_of_the_card_in_half_precision():
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    hashes = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.safetensors")}
    assert hashes == {n: hashlib.sha256(path.read_bytes()).hexdigest() for n, path in files.items()}
    for path in files.values():
        assert {v.dtype for v in load_file(path).values()} <= {torch.float16, torch.int64}
    for folder, limit in SIZES.items():
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < limit


@pytest.fixture(scope="module")
def loaded():
    return scorer.load()


def encoded(loaded, lines):
    return loaded[0].encode_text(loaded[2](lines), normalize=True)


@pytest.mark.slow
@torch.no_grad()
def test_mini_flow_loads_in_diffusers_alone_and_draws_what_it_is_told(loaded):
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        mini.flow_dir(), dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    prompts = [FLAT.format(row["label"]) for row in read_metadata("mini-heldout")[:24]]
    images = pipeline(
        prompts,
        guidance_scale=4.0,
        num_inference_steps=20,
        height=64,
        width=64,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(number) for number in range(24)],
    ).images
    embeddings = loaded[0].encode_image(torch.stack([loaded[1](image) for image in images]), True)
    matches = (embeddings @ encoded(loaded, prompts).T).argmax(dim=1)
    assert (matches == torch.arange(24)).float().mean() > 0.9  # chance: 1 / 24


@torch.no_grad()
def test_open_clip_loads_the_scorer_by_itself(loaded):
    factory: Any = open_clip  # its annotations know too many return types
    source = f"local-dir:{scorer.scorer_dir()}"
    model, preprocess = factory.create_model_from_pretrained(source)
    image = Image.open(mini.heldout_dir() / "1f407.png")
    assert torch.equal(loaded[1](image), preprocess(image))
    tokens = loaded[2]([SOLID.format("rabbit"), "mañana 🐇", "word " * 99])
    assert torch.equal(loaded[0].encode_text(tokens), model.eval().encode_text(tokens))


@pytest.mark.slow
@torch.no_grad()
def test_the_figures_of_the_scorers_card_come_out_again(loaded):
    figures = json.loads((scorer.scorer_dir() / "figures.json").read_text())["figures"]
    rows = read_metadata("mini-heldout")
    images = [Image.open(mini.heldout_dir() / row["file_name"]) for row in rows]
    embeddings = loaded[0].encode_image(torch.stack([loaded[1](image) for image in images]), True)
    labels, bank = [row["label"] for row in rows], scorer.captions()
    right, flat = ([form.format(label) for label in labels] for form in (SOLID, FLAT))
    assert len(set(bank)) == len(bank) == 2 * 1570
    assert {*right, *flat} <= set(bank)
    similarity = embeddings @ encoded(loaded, right).T
    matched_captions = [
        bank[i] for i in (embeddings @ encoded(loaded, bank).T).argmax(dim=1).tolist()
    ]
    row_numbers = torch.arange(len(rows))
    measured = {
        "image_to_text_top1": (similarity.argmax(dim=1) == row_numbers).float().mean(),
        "text_to_image_top1": (similarity.argmax(dim=0) == row_numbers).float().mean(),
        "caption_object_top1": sum(
            f in p for f, *p in zip(matched_captions, right, flat, strict=True)
        )
        / 128,
        "caption_style_top1": sum(" ToK " in line for line in matched_captions) / 128,
    }
    card = (scorer.scorer_dir() / "README.md").read_text(encoding="utf-8")
    for name, value in measured.items():  # one picture may fall to the other side of a tie
        assert float(value) == pytest.approx(figures[name], abs=1.01 / 128), name
        assert f"{100 * figures[name]:.1f} %" in card, name


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "captions.txt"])
def test_a_missing_file_of_the_scorer_is_named(tmp_path, name):
    for path in scorer.scorer_dir().iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=name):
        scorer.captions(tmp_path) if name == "captions.txt" else scorer.load(tmp_path)


def run(folder, digests):
    folder.mkdir()
    lines = [json.dumps({"step": n, "digest": d}) for n, d in enumerate(digests, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize(("digests", "step"), [("xyz", None), ("xyw", 3), ("xy", 3), ("xyzx", 4)])
def test_only_runs_of_equal_digests_are_compared(tmp_path, digests, step):
    pair = [run(tmp_path / "a", "xyz"), run(tmp_path / "b", digests)]
    if step is None:
        assert require_paired(pair) == 3
    else:
        with pytest.raises(TrainingError, match=f"step {step}"):
            require_paired(pair)


def test_the_demo_s_difference_is_of_colors_not_of_detail():
    black, white, gray = (Image.new("RGB", (64, 64), (v, v, v)) for v in (0, 255, 127))
    stripes = Image.new("RGB", (64, 64))
    stripes.putdata([(255 * (number % 2),) * 3 for number in range(64 * 64)])
    assert difference([white, black], [black, black]) == 50
    assert difference([stripes], [gray]) < 1


@pytest.mark.slow
def test_the_plain_loop_takes_its_steps(capsys):
    own_loop.main(["--steps", "1"])
    head, *curves = capsys.readouterr().out.splitlines()[-3:]
    assert head.endswith("at 0")
    assert [line.split()[-1] for line in curves] == [curves[0].split()[-1]] * 2
