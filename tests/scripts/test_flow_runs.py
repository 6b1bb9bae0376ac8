"""Runs of flow-matching models with tiny random weights, mainly SD3 and Qwen-Image."""

import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.noise_schedules import FlowMatching
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.run import runlog
from tests.image.tiny import FILES, shared
from tests.scripts.runs import column, flags, resumes_exactly, train, two_icons, weights

SD3 = "StableDiffusion3Pipeline"
QWEN = "QwenImagePipeline"
MARKS = {SD3: (), QWEN: pytest.mark.slow}
"""Marks of each pipeline class; the other classes run only in `make test-matrix`."""
KINDS = [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.matrix)) for kind in FILES]


def on(kind, **values):
    """Return the flags of a run on the tiny model of a pipeline class."""
    return {
        "pretrained_model_name_or_path": shared(kind),
        "resolution": 64,
        "train_batch_size": 2,
        **values,
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_measures_samples_and_exports_a_file_that_its_pipeline_loads(kind, tmp_path):
    values = on(
        kind,
        checkpointing_steps=1,
        learning_rate=3e-2,
        validation_loss_steps=1,
        validation_dataset="mini-heldout",
        max_eval_samples=4,
        validation_prompt="a TOK icon of a rabbit",
        num_validation_images=1,
    )
    if kind == QWEN:
        values["quantize"] = "nf4"
    folder = train(tmp_path / "run", **values)
    resumes_exactly(folder, 1, **values)
    first = next(row for row in runlog.read_metrics(folder) if "heldout_loss" in row)
    levels = [int(name.rpartition("/")[2]) for name in first if "by_level/" in name]
    assert len(levels) == 10
    assert levels == sorted(levels, reverse=True)
    assert 0 < levels[-1] < levels[0] <= 1000
    assert len(set(column(folder, "heldout_loss"))) == 3
    image_folders = sorted(file.parent.name for file in folder.glob("validation/*/*.png"))
    assert image_folders == ["step-1", "step-2"]
    assert all(name.startswith("transformer.") for name in weights(folder))
    pipeline = load_pipeline(str(shared(kind)), dtype=torch.float32)
    if not hasattr(pipeline, "load_lora_weights"):
        return

    def sample_bytes():
        return generate(pipeline, ["a TOK icon"], [0], size=64, steps=2)[0].tobytes()

    before = sample_bytes()
    pipeline.load_lora_weights(str(folder))
    assert sample_bytes() != before


@pytest.mark.slow
def test_held_predictions_add_to_the_loss_and_masks_change_it(tmp_path):
    """Class and unconditional predictions are held; half of each image is masked."""
    icons = two_icons(tmp_path / "icons")
    values = {
        **icons,
        **on(SD3),
        "validation_dataset": "none",
        "learning_rate": 3e-2,
        "class_prompt": "an icon",
    }
    plain = column(train(tmp_path / "plain", **values), "loss")
    with_class = train(tmp_path / "class", **values, prior_prediction_weight=1.0)
    holding = {"hold_unconditional": 1.0, "hold_unconditional_every": 1}
    for folder in (with_class, train(tmp_path / "held", **values, **holding)):
        losses = column(folder, "loss")
        assert losses[0] == pytest.approx(plain[0], rel=1e-5)  # the adapters change nothing yet
        assert losses[1] > plain[1]
    for picture in Path(icons["dataset"]).glob("*.png"):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(picture.with_suffix(".mask.png"))
    hidden = column(train(tmp_path / "hidden", **values), "loss")
    assert hidden[0] != plain[0]
    assert hidden[0] == pytest.approx(plain[0], rel=0.5)


@pytest.mark.slow
def test_the_log_has_the_sampled_noise_levels(tmp_path, monkeypatch):
    levels = []
    sample_level_index = FlowMatching.sample_level_index

    def record_level(self, random):
        index = sample_level_index(self, random)
        levels.append(1000 * self.sigmas[index].item())
        return index

    monkeypatch.setattr(FlowMatching, "sample_level_index", record_level)
    run = train(tmp_path / "run", **on(SD3, max_train_steps=3))
    del levels[0]  # the level of the probe before the first step
    steps = [levels[0:2], levels[2:4], levels[4:6]]  # batches of two
    for name, statistic in {"mean": statistics.mean, "min": min, "max": max}.items():
        expected = [statistic(step_levels) for step_levels in steps]
        assert column(run, f"noise_level_{name}") == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_ignored_dora_magnitudes_and_guidance_are_reported(tmp_path, caplog):
    """ComfyUI ignores DoRA's magnitudes. SD3 ignores guidance, as it has no embedding for it."""
    values = on(SD3, use_dora=True, guidance_scale=2.0, max_train_steps=1)
    folder = train(tmp_path / SD3, **values)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (caplog.text, card):
        assert "magnitudes" in text
        assert "use_dora" in text
    assert "without a guidance embedding" in caplog.text
    assert runlog.read_run(folder)["config"]["guidance_scale"] is None
    caplog.clear()
    cfg = resolve(flags(tmp_path / "flux", **on("FluxPipeline", guidance_scale=2.0)))
    assert "without a guidance embedding" not in caplog.text
    assert cfg.guidance_scale == 2.0


@pytest.mark.parametrize("option", ["hold_unconditional", "guided_target"])
def test_options_for_unconditional_predictions_are_refused_for_models_without_one(tmp_path, option):
    turbo = tmp_path / "Z-Image-Turbo"
    turbo.symlink_to(shared("ZImagePipeline"))
    sentence = f"--{option} 4.0 with a model without an unconditional prediction.*drop it"
    for model in (shared("FluxPipeline"), turbo):
        values = on(SD3, max_train_steps=16, **{option: 4})
        values["pretrained_model_name_or_path"] = model
        with pytest.raises(UserError, match=sentence):
            resolve(flags(tmp_path / "run", **values))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("resolution", 72, "a side of 72 pixels"),
        ("resolution", 512, "a side of 512 pixels"),
        ("train_text_encoder", True, "--train_text_encoder with a"),
        ("snr_gamma", 5, "--snr_gamma 5.0 with a"),
        ("lora_layers", "to_k,to_qq", '--lora_layers "to_qq"'),
        ("output_kohya_format", True, "--output_kohya_format with a"),
    ],
)
def test_options_that_a_model_does_not_support_are_refused(name, value, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", **on(SD3, **{name: value}))
    assert not (tmp_path / "run" / "run.json").exists()
