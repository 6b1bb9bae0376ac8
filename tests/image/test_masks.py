"""Which part of an image is learned: where masks come from, and what they do to the loss."""

import json
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image import crops
from bilora_diffusion.image.latents import weight_map
from bilora_diffusion.image.noise_schedules import Denoising, FlowMatching, weighted_mean
from bilora_diffusion.image.opening import open_images
from tests.scripts.runs import column, resumes_exactly, train

SIDE = 64
FILES = ("a.jpg", "a.mask.png", "b.jpg")


def picture(folder, name, mask=None):
    Image.effect_noise((SIDE, SIDE), 60).convert("RGB").save(folder / f"{name}.jpg")
    if mask is not None:
        mask.save(folder / f"{name}.mask.png")


def half(box=(0, 0, SIDE // 2, SIDE)):
    """Bright in one half, dark in the other."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, box)
    return mask


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(folder, "a", half())
    picture(folder, "b")
    return folder


def test_masks_lie_beside_images_and_are_no_images(photos):
    half().save(photos / "alone.mask.png")
    images = open_images(str(photos))
    assert [entry.name for entry in images.entries] == ["a.jpg", "b.jpg"]
    assert [images.mask(i) is None for i in range(2)] == [False, True]
    masks, left_out = images.remarks()
    assert "1 of 2 images" in masks
    assert "1 file (alone.mask.png)" in left_out
    half((0, 0, SIDE, SIDE // 2)).save(photos / "a.mask.png")
    edited = open_images(str(photos))
    assert edited.fingerprint() != images.fingerprint()
    names = [sample.hashes.keys() for sample in edited.sample_contents()]
    assert ["mask" in parts for parts in names] == [True, False]


@pytest.mark.parametrize(
    ("folder", "metadata", "content"),
    [
        ("", "", ""),
        ("x", "x/a.txt", "a caption"),
        ("x/y", "metadata.csv", "file_name\nx/y/a.jpg\nx/y/b.jpg"),
        ("train", "train/metadata.jsonl", '{"file_name": "a.jpg"}\n{"file_name": "b.jpg"}'),
    ],
)
@pytest.mark.parametrize("suffix", [".mask.png", ".Mask.WEBP"])
def test_a_mask_beside_an_image_is_its_mask_in_every_layout(
    folder, metadata, content, suffix, tmp_path
):
    place = tmp_path / "set" / folder
    place.mkdir(parents=True)
    picture(place, "a")
    picture(place, "b")
    half().convert("RGB").save(place / f"a{suffix}", lossless=True)
    half().save(place / "alone.mask.png")
    if metadata:
        (tmp_path / "set" / metadata).write_text(content)
    images = open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert len(images) == 2
    assert images.mask(0).tobytes() == half().tobytes()
    assert images.mask(1) is None
    assert any(line.startswith("masks") and "1 of 2" in line for line in images.remarks())


def test_masks_in_a_table_of_images_are_refused(photos, tmp_path):
    stored = [{"path": name, "bytes": (photos / name).read_bytes()} for name in FILES]
    (tmp_path / "set").mkdir()
    table = Dataset.from_dict({"image": stored}, Features({"image": ImageFeature()}))
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r'"a\.mask\.png" among its images.*--mask_column'):
        open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))


def test_masks_are_named_in_metadata_columns_of_sets_and_alpha(photos, tmp_path):
    (photos / "a.mask.png").rename(photos / "hides.png")
    rows: list[dict[str, Any]] = [{"file_name": "a.jpg", "m": "hides.png"}, {"file_name": "b.jpg"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = open_images(str(photos), mask_column="m")
    assert not any("left out" in line for line in listed.remarks())
    pictures = [str(photos / name) for name in ("a.jpg", "b.jpg")]
    columns = {"image": pictures, "m": [str(photos / "hides.png"), None], "text": ["x", "y"]}
    features = Features({"image": ImageFeature(), "m": ImageFeature(), "text": Value("string")})
    hub = tmp_path / "set"
    hub.mkdir()
    Dataset.from_dict(columns, features).to_parquet(hub / "train.parquet")
    loaded = open_images(str(hub), mask_column="m", caption_column="text")
    clear = tmp_path / "clear"
    clear.mkdir()
    with_alpha = Image.open(photos / "a.jpg").convert("RGBA")
    with_alpha.putalpha(half())
    with_alpha.save(clear / "a.png")
    with_alpha.convert("RGB").save(clear / "b.png")
    for images in (listed, loaded, open_images(str(clear), alpha_mask=True)):
        mask = images.mask(0)
        assert mask.tobytes() == half().tobytes()
        assert images.mask(1) is None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda p: half().resize((32, 32)).save(p / "a.mask.png"), "its mask is 32 x 32 pixels"),
        (lambda p: Image.new("L", (SIDE, SIDE)).save(p / "a.mask.png"), "black all over"),
        (lambda p: half().save(p / "a.mask.bmp"), "a.mask.bmp.*a.mask.png.*keep one"),
        (lambda p: (p / "metadata.csv").write_text("file_name\na.mask.png"), "line 2.*a mask by"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(photos, spoil, sentence):
    spoil(photos)
    with pytest.raises(UserError, match=sentence):
        open_images(str(photos))


def test_masks_from_nowhere_are_refused(photos):
    with pytest.raises(UserError, match="--mask_column"):
        open_images(str(photos), mask_column="m")
    Image.new("L", (SIDE, SIDE), 255).save(photos / "a.mask.png")
    with pytest.raises(UserError, match=r"no mask of .*photos, from the .mask files"):
        open_images(str(photos)).require_masks()


def test_a_mask_is_cut_as_its_image_is():
    gray = Image.effect_noise((90, 70), 60)
    crop = crops.Crop(0, 7, True)
    image, mask = (
        crops.cut(crops.resize(source, (32, 32), "bilinear"), crop, (32, 32))
        for source in (gray.convert("RGB"), gray)
    )
    assert torch.equal(mask, image[:1])


def test_the_loss_is_the_mean_of_what_is_shown_and_has_no_gradient_elsewhere():
    squares = torch.rand(3, 4, 8, 8, dtype=torch.float64)
    unmasked = crops.resize(half(), (SIDE, SIDE), "bilinear")
    mask = crops.cut(unmasked, crops.Crop(0, 0, False), (SIDE, SIDE))
    weights = weight_map([mask, None, torch.zeros(1, 8, 8)], squares, 0.0)
    means = [squares[0, :, :, :4].mean(), squares[1].mean(), torch.tensor(0.0)]
    assert torch.allclose(weighted_mean(squares, weights), torch.stack(means).double())
    faint = weight_map([mask, None, None], squares, 0.25)
    left, right = squares[0, :, :, :4].sum(), squares[0, :, :, 4:].sum()
    expected = (left + 0.25 * right) / (4 * 8 * (4 + 0.25 * 4))
    assert float(weighted_mean(squares, faint)[0]) == pytest.approx(float(expected))

    x0, noise = torch.randn(2, 3, 4, 8, 8)
    inputs = {"latents": x0, "noise": noise, "level_index": torch.tensor([10, 400, 700])}
    inputs |= {"is_instance": torch.ones(3, dtype=torch.bool), "mask_weights": weights}
    config = dict(DDPMScheduler().config)
    kinds = [Denoising.from_config(config), Denoising.from_config(config, edm=True)]
    for kind in (*kinds, FlowMatching.from_config(config, None)):
        answer = torch.randn(3, 4, 8, 8, requires_grad=True)
        loss = kind.loss(answer, inputs)
        (gradient,) = torch.autograd.grad(loss.sum(), answer)
        assert bool((gradient[0, :, :, :4] != 0).all())
        assert not gradient[0, :, :, 4:].any()
        assert bool((gradient[1] != 0).all())
        assert not gradient[2].any()


@pytest.mark.slow
def test_a_run_learns_what_is_shown(photos, tmp_path):
    shared = {
        **{"dataset": photos, "pretrained_model_name_or_path": "mini", "checkpointing_steps": 1},
        **{"instance_prompt": "a TOK", "train_batch_size": 1},
    }
    run = train(tmp_path / "run", **shared)
    resumes_exactly(run, 1, **shared, cache_latents="no", dataloader_num_workers=1)
    (photos / "a.mask.png").unlink()
    unmasked = train(tmp_path / "whole", **shared)
    assert column(run, "loss") != column(unmasked, "loss")
    assert column(run, "digest") != column(unmasked, "digest")
