"""Masks: where they come from, and their effect on the loss."""

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


def save_picture(path):
    Image.effect_noise((SIDE, SIDE), 60).convert("RGB").save(path)


def half(box=(0, 0, SIDE // 2, SIDE)):
    """Return a mask that is white in the box, by default the left half, and black elsewhere."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, box)
    return mask


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_picture(folder / "a.jpg")
    half().save(folder / "a.mask.png")
    save_picture(folder / "b.jpg")
    return folder


def test_mask_files_next_to_images_are_read_as_masks_and_not_as_images(photos):
    half().save(photos / "alone.mask.png")
    images = open_images(str(photos))
    assert [entry.name for entry in images.entries] == ["a.jpg", "b.jpg"]
    assert images.mask(0) is not None
    assert images.mask(1) is None
    masks, left_out = images.remarks()
    assert "1 of 2 images" in masks
    assert "1 file (alone.mask.png)" in left_out
    half((0, 0, SIDE, SIDE // 2)).save(photos / "a.mask.png")
    edited = open_images(str(photos))
    # Another mask makes it another set of samples.
    assert edited.fingerprint() != images.fingerprint()
    masked, unmasked = edited.sample_contents()
    assert "mask" in masked.hashes
    assert "mask" not in unmasked.hashes


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
def test_a_mask_file_next_to_its_image_is_read_in_every_folder_layout(
    folder, metadata, content, suffix, tmp_path
):
    place = tmp_path / "set" / folder
    place.mkdir(parents=True)
    save_picture(place / "a.jpg")
    save_picture(place / "b.jpg")
    # Lossy compression would change the mask.
    half().convert("RGB").save(place / f"a{suffix}", lossless=True)
    half().save(place / "alone.mask.png")
    if metadata:
        (tmp_path / "set" / metadata).write_text(content)
    images = open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert len(images) == 2
    assert_first_image_is_masked(images)
    (masks_line,) = [line for line in images.remarks() if line.startswith("masks")]
    assert "1 of 2" in masks_line


def test_masks_in_a_table_of_images_are_refused(photos, tmp_path):
    stored = []
    for file in sorted(photos.iterdir()):
        stored.append({"path": file.name, "bytes": file.read_bytes()})
    (tmp_path / "set").mkdir()
    table = Dataset.from_dict({"image": stored}, Features({"image": ImageFeature()}))
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r'"a\.mask\.png" among its images.*--mask_column'):
        open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))


def assert_first_image_is_masked(images):
    assert images.mask(0).tobytes() == half().tobytes()
    assert images.mask(1) is None


def test_a_metadata_file_can_name_the_masks(photos):
    (photos / "a.mask.png").rename(photos / "hides.png")
    (photos / "metadata.csv").write_text("file_name,m\na.jpg,hides.png\nb.jpg,\n")
    images = open_images(str(photos), mask_column="m")
    assert_first_image_is_masked(images)
    assert not any("left out" in line for line in images.remarks())


def test_masks_can_be_a_column_of_a_table(photos, tmp_path):
    columns = {
        "image": [str(photos / "a.jpg"), str(photos / "b.jpg")],
        "m": [str(photos / "a.mask.png"), None],
        "text": ["x", "y"],
    }
    features = Features({"image": ImageFeature(), "m": ImageFeature(), "text": Value("string")})
    (tmp_path / "set").mkdir()
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / "train.parquet")
    images = open_images(str(tmp_path / "set"), mask_column="m", caption_column="text")
    assert_first_image_is_masked(images)


def test_masks_can_be_the_alpha_channel_of_images(photos, tmp_path):
    with_alpha = Image.open(photos / "a.jpg").convert("RGBA")
    with_alpha.putalpha(half())
    (tmp_path / "set").mkdir()
    with_alpha.save(tmp_path / "set" / "a.png")
    with_alpha.convert("RGB").save(tmp_path / "set" / "b.png")
    assert_first_image_is_masked(open_images(str(tmp_path / "set"), alpha_mask=True))


@pytest.mark.parametrize(
    ("mask", "name", "sentence"),
    [
        (half().resize((32, 32)), "a.mask.png", "its mask is 32 x 32 pixels"),
        (Image.new("L", (SIDE, SIDE)), "a.mask.png", "all black"),
        (half(), "a.mask.bmp", "a.mask.bmp.*a.mask.png.*keep one"),
    ],
)
def test_an_invalid_or_duplicate_mask_is_refused(photos, mask, name, sentence):
    mask.save(photos / name)
    with pytest.raises(UserError, match=sentence):
        open_images(str(photos))


def test_a_mask_listed_as_an_image_in_metadata_is_refused(photos):
    (photos / "metadata.csv").write_text("file_name\na.mask.png")
    with pytest.raises(UserError, match=r"line 2.*the name of a mask"):
        open_images(str(photos))


def test_missing_masks_and_masks_that_hide_nothing_are_refused(photos):
    with pytest.raises(UserError, match="--mask_column"):
        open_images(str(photos), mask_column="m")
    Image.new("L", (SIDE, SIDE), 255).save(photos / "a.mask.png")
    with pytest.raises(UserError, match=r"no mask of .*photos, from the .mask files"):
        open_images(str(photos)).require_masks()


def test_a_mask_is_cropped_like_its_image():
    gray = Image.effect_noise((90, 70), 60)
    crop = crops.Crop(0, 7, True)
    mask = crops.cut(crops.resize(gray, (32, 32), "bilinear"), crop, (32, 32))
    resized_image = crops.resize(gray.convert("RGB"), (32, 32), "bilinear")
    assert torch.equal(mask, crops.cut(resized_image, crop, (32, 32))[:1])


LEFT_HALF = torch.zeros(1, SIDE, SIDE)  # in pixels; latents have an eighth of the width and height
LEFT_HALF[:, :, : SIDE // 2] = 1


def test_the_loss_is_the_mean_over_the_visible_part():
    squares = torch.rand(3, 4, 8, 8, dtype=torch.float64)
    # One image has its left half visible, one has no mask, and one has an all-black mask.
    weights = weight_map([LEFT_HALF, None, torch.zeros(1, 8, 8)], squares, 0.0)
    losses = weighted_mean(squares, weights)
    expected = [float(squares[0, :, :, :4].mean()), float(squares[1].mean()), 0.0]
    assert losses.tolist() == pytest.approx(expected)

    # The hidden part has a quarter of the weight in the loss.
    faint_weights = weight_map([LEFT_HALF, None, None], squares, 0.25)
    faint_loss = weighted_mean(squares, faint_weights)[0]
    left, right = squares[0, :, :, :4].sum(), squares[0, :, :, 4:].sum()
    expected_loss = (left + 0.25 * right) / (4 * 8 * (4 + 0.25 * 4))
    assert float(faint_loss) == pytest.approx(float(expected_loss))


CONFIG = dict(DDPMScheduler().config)


@pytest.mark.parametrize(
    "denoising",
    [
        Denoising.from_config(CONFIG),
        Denoising.from_config(CONFIG, edm=True),
        FlowMatching.from_config(CONFIG, None),
    ],
)
def test_no_loss_has_a_gradient_where_the_image_is_hidden(denoising):
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    inputs = {
        "latents": x0,
        "noise": noise,
        "level_index": torch.tensor([10, 400, 700]),
        "is_instance": torch.ones(3, dtype=torch.bool),
        "mask_weights": weight_map([LEFT_HALF, None, torch.zeros(1, 8, 8)], x0, 0.0),
    }
    prediction = torch.randn(3, 4, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(denoising.loss(prediction, inputs).sum(), prediction)
    assert gradient[0, :, :, :4].all()
    assert not gradient[0, :, :, 4:].any()
    assert gradient[1].all()
    assert not gradient[2].any()


@pytest.mark.slow
def test_a_masked_run_resumes_exactly_and_differs_from_an_unmasked_one(photos, tmp_path):
    shared = {
        "dataset": photos,
        "pretrained_model_name_or_path": "mini",
        "checkpointing_steps": 1,
        "instance_prompt": "a TOK",
        "train_batch_size": 1,
    }
    run = train(tmp_path / "run", **shared)
    resumes_exactly(run, 1, **shared, cache_latents="no", dataloader_num_workers=1)
    (photos / "a.mask.png").unlink()
    unmasked = train(tmp_path / "unmasked", **shared)
    assert column(run, "loss") != column(unmasked, "loss")
    assert column(run, "digest") != column(unmasked, "digest")
