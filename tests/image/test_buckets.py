"""Images of several shapes in one run: sizes, crops, conditioning, batches."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.crops import nearest_bucket, read_sizes, sizes_around
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.stream import TrainingStream, centered_samples
from tests.export.export_models import write_lora
from tests.scripts.runs import column, flags, train

SHAPES = {"a": (64, 64), "b": (80, 53), "c": (53, 80), "d": (200, 100), "e": (100, 190)}
"""Name of an image -> its width and height."""
BUCKETS = "64,64;48,80;80,48;32,64;64,32"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in SHAPES.items():
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{name}.png")
    return folder


def settings(photos, **values):
    shared = {"dataset": photos, "instance_prompt": "a TOK", "aspect_ratio_buckets": BUCKETS}
    return {**shared, "pretrained_model_name_or_path": "mini", "report_to": "none", **values}


@given(st.sampled_from([64, 256, 512, 768, 1024]))
def test_chosen_sizes_have_at_most_as_many_pixels_as_the_square(side):
    sizes = sizes_around(side)
    assert (side, side) in sizes
    for height, width in sizes:
        assert (width, height) in sizes
        assert height % 16 == width % 16 == 0
        assert 0.5 <= height / width <= 2
        # Sides are multiples of 16, so the area can be smaller than the square's.
        assert 0.6 * side * side <= height * width <= side * side


@given(st.integers(16, 4000), st.integers(16, 4000))
def test_an_image_gets_the_bucket_with_the_nearest_aspect_ratio(height, width):
    def distance(size):
        """Return the distance between a size's ratio and the image's, on a logarithmic scale."""
        return abs(math.log(size[0] / size[1]) - math.log(height / width))

    chosen = nearest_bucket((height, width), sizes_around(1024))
    assert distance(chosen) <= min(map(distance, sizes_around(1024))) + 1e-6


def test_the_images_of_a_step_have_one_size_and_matching_time_ids(photos, tmp_path):
    images = open_images(str(photos))
    cfg = resolve(flags(tmp_path / "run", **settings(photos, random_flip=True)))
    stream = TrainingStream(cfg, images)
    assert stream.sizes == [(64, 64), (48, 80), (80, 48), (32, 64), (64, 32)]
    counts = Counter()
    for _, (first, second) in stream.batches([(step, (0, 1)) for step in range(20)], 2):
        assert first.size == second.size
        for sample in (first, second):
            counts[sample.name.removesuffix(".png")] += 1
            height, width = sample.size
            pixels, _ = sample.read()
            assert pixels.shape == (3, height, width)
            image_width, image_height = SHAPES[sample.name[0]]
            top, left = sample.crop.top, sample.crop.left
            assert sample.time_ids == (image_height, image_width, top, left, height, width)
            scale = max(height / image_height, width / image_width)
            # The crop lies inside the image, which was resized to cover the bucket.
            assert 0 <= top <= image_height * scale - height + 1e-9
            assert 0 <= left <= image_width * scale - width + 1e-9
    # 20 steps of 2 samples are 8 epochs of 5 images.
    assert counts == dict.fromkeys(SHAPES, 8)
    assert [sample.size for sample in centered_samples(images, cfg)] == stream.sizes


@pytest.mark.slow
def test_five_shapes_train_with_an_assistant_however_a_step_is_divided(photos, tmp_path):
    pipeline = load_pipeline("mini", dtype=torch.float32)
    assistant = write_lora(tmp_path / "style", pipeline, size=0.5)
    shared = settings(photos, max_train_steps=3, validation_dataset=photos)
    shared["assistant_lora"] = f"{assistant}:-0.5"
    shared |= {"validation_loss_steps": 3, "trigger_word": "TOK"}
    run = train(tmp_path / "run", **shared, train_batch_size=4)
    divided_run = train(
        tmp_path / "divided", **shared, train_batch_size=2, gradient_accumulation_steps=2
    )
    assert column(run, "digest") == column(divided_run, "digest")
    assert column(run, "loss") == pytest.approx(column(divided_run, "loss"), abs=1e-6)
    assert column(run, "grad_norm") == pytest.approx(column(divided_run, "grad_norm"), rel=1e-4)
    assert len(column(run, "heldout_loss")) == 2
    assert column(run, "heldout_loss") == column(run, "train_grid_loss")  # the same images


def test_class_images_have_the_size_of_their_step(photos, tmp_path):
    options = {
        "with_prior_preservation": True,
        "class_data_dir": "class",
        "class_prompt": "a thing",
    }
    cfg = resolve(flags(tmp_path / "run", **settings(photos, **options)))
    stream = TrainingStream(cfg, open_images(str(photos)), open_images("mini"))
    for _, samples in stream.batches([(step, (0, 1)) for step in range(10)], 2):
        kinds = [sample.kind for sample in samples]
        assert kinds == ["instance", "instance", "class", "class"]
        assert len({sample.size for sample in samples}) == 1


@pytest.mark.parametrize("text", ["square", "64", "64,64;", "70,64", "0,64"])
def test_invalid_buckets_are_refused(text):
    with pytest.raises(UserError, match=f'"{text}.*--?aspect_ratio_buckets|buckets "{text}"'):
        read_sizes(text)
