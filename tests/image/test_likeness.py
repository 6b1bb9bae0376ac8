"""The distance between samples and held-out pictures, and `--keep_best`, which uses it."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.likeness import image_embedder, image_model_bytes
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.run import runlog
from tests.eval.clip_models import save_dinov2
from tests.scripts.runs import column, train, two_icons

SAMPLER_STEPS = 2


@pytest.fixture
def icons(tmp_path) -> dict[str, Any]:
    """Return a run's options: two training icons, two held-out ones, a high learning rate."""
    return {
        **two_icons(tmp_path / "icons"),
        "validation_num_inference_steps": SAMPLER_STEPS,
        "validation_loss_steps": 2,
        "checkpointing_steps": 6,
        "max_train_steps": 6,
        "learning_rate": 3e-2,
    }


def test_dinov2_embeds_images_as_its_class_token_and_other_models_are_refused(tmp_path):
    folder = save_dinov2(tmp_path / "dino")
    image = Image.new("RGB", (40, 30), (200, 20, 90))
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.inference_mode():
        embeddings = image_embedder(f"dinov2:{folder}", torch.device("cpu"))([image, image])
        expected = AutoModel.from_pretrained(folder)(**pixels).last_hidden_state[:, 0]
    assert embeddings.shape[0] == 2
    assert torch.allclose(embeddings, expected.expand_as(embeddings), atol=1e-5)
    for name in ("dinov3:a", "dinov2:", "clip"):
        with pytest.raises(UserError, match=r"--image_model .* is unknown: give dinov2:"):
            resolve(["--dataset", "mini", "--keep_best", "--image_model", name])


@pytest.mark.slow
def test_a_missing_image_model_is_refused_before_anything_is_written(tmp_path):
    options = {"keep_best": True, "validation_dataset": "mini-heldout"}
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"--image_model dinov2:a/b can't be read.*choose_by"):
            train(tmp_path / "run", **options, image_model="dinov2:a/b", dry_run=dry_run)
        assert not (tmp_path / "run").exists()


def test_dinov2s_size_is_known_without_its_weights(tmp_path):
    folder = save_dinov2(tmp_path / "dino")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    (folder / "model.safetensors").unlink()
    assert image_model_bytes(f"dinov2:{folder}") == size
    assert image_model_bytes("embedded") == 0


@pytest.mark.slow
def test_keep_best_keeps_the_step_with_the_nearest_samples(icons, tmp_path):
    run = train(tmp_path / "run", **icons, keep_best=True)
    distances = dict(zip([0, 2, 4, 6], column(run, "heldout_distance"), strict=True))
    results = runlog.read_run(run)["results"]
    best = min([2, 4, 6], key=distances.__getitem__)  # not step 0, where the adapter does nothing
    assert results["best_step"] == best
    assert results["best_heldout_distance"] == distances[best]

    # The same distance by hand: load the exported file, sample both captions and compare.
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    pipeline.load_lora_weights(run)
    pictures = []
    for file in sorted(icons["validation_dataset"].glob("*.png")):
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
    prompts = [icons["instance_prompt"]] * 2
    settings: dict[str, Any] = {"size": 64, "steps": SAMPLER_STEPS, "guidance_from": 0.5}
    images = generate(pipeline, prompts, [0, 1], **settings)
    embed = image_embedder("embedded", torch.device("cpu"))
    with torch.inference_mode():
        cosines = (normalize(embed(images)) * normalize(embed(pictures))).sum(dim=1)
    assert distances[best] == pytest.approx(float(1 - cosines.mean()), abs=1e-3)

    # The measurement does not change the training.
    by_loss = train(tmp_path / "loss", **icons, keep_best=True, choose_by="loss")
    assert column(by_loss, "digest") == column(run, "digest")
    assert column(by_loss, "loss") == column(run, "loss")
    assert not column(by_loss, "heldout_distance")
    losses = dict(zip([0, 2, 4, 6], column(by_loss, "heldout_loss"), strict=True))
    best_by_loss = min([2, 4, 6], key=losses.__getitem__)
    assert runlog.read_run(by_loss)["results"]["best_step"] == best_by_loss

    resume = {"keep_best": True, "resume_from_checkpoint": "latest"}
    for option, value in (("validation_guidance_scale", 2), ("choice_guidance_from", "adapter")):
        with pytest.raises(UserError, match=f"{option} was"):
            train(run, **icons, **resume, **{option: value})
