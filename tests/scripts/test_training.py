"""Whole runs on the miniature: what the image script and the loop promise whatever the method."""

import dataclasses
import json
import re
import resource
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.core.values import BY_LEVEL, NOISE_LEVELS
from bilora_diffusion.export.__main__ import main as export
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.image.loss import DreamBoothModule
from bilora_diffusion.methods import get
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run import runlog
from bilora_diffusion.train import command, engine, trainer
from tests.scripts import runs


def test_methods_are_paired_and_seeds_are_not(tmp_path):
    shared = {"max_train_steps": 3, "train_batch_size": 1}
    plain, folder = runs.train_once(method="lora", **shared), runs.train_once(rho=0.01, **shared)
    reseeded = runs.train(tmp_path, method="lora", seed=1, train_batch_size=1, max_train_steps=1)
    digests = [runs.column(run, "digest") for run in (plain, folder, reseeded)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3
    assert not set(digests[0]) & set(digests[2])
    # The auxiliary starts at zero: the first loss is LoRA's to the bit, later ones are not.
    losses = [runs.column(run, "loss") for run in (plain, folder)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][2] != losses[1][2]
    # It stays in its ball and out of the file.
    assert all(norm <= 0.01 * (1 + 1e-6) for norm in runs.column(folder, "auxiliary_norm"))
    assert max(runs.column(folder, "auxiliary_norm_before")) > 0.01
    assert not [key for key in runs.weights(folder) if "auxiliary" in key]
    export = runlog.read_run(folder)["results"]["export"]
    assert export["auxiliary_keys"] == 0
    for file in ("", "kohya_"):
        assert export[f"{file}max_relative_difference"] < 1e-6
    assert inspect(folder / "run.safetensors").format == "kohya"


class Reads(TorchFunctionMode):
    """Notes what reads a tensor's numbers, for which a GPU's queue would be waited for."""

    names: tuple[str, ...] = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__):
            Reads.names += (func.__name__,)
        return func(*args, **(kwargs or {}))


def test_no_number_is_read_before_a_step_is_made(tmp_path, monkeypatch):
    method = get("bilora")
    step, losses = method.step, []

    def watched(*args):
        with Reads():
            losses.append(step(*args))
        return losses[-1]

    monkeypatch.setattr(method, "step", watched)
    monkeypatch.setattr(Reads, "names", ())
    runs.train(tmp_path, train_batch_size=1, gradient_accumulation_steps=2)
    assert len(losses) == 2
    assert Reads.names == ()


OPTIONS = {
    "use_dora": True,
    "lora_dropout": 0.2,
    "report_to": "tensorboard",
    "lora_alpha": 6,
    "use_ema": True,
    "ema_decay": 0.5,
}
STREAM = {
    "random_flip": True,
    "cache_latents": "no",
    "dataloader_num_workers": 1,
    "trigger_word": "sks",
    "shuffle_tags": True,
    "caption_dropout": 0.5,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
}
ENCODERS = {
    "train_text_encoder": True,
    "text_encoder_lr": 1e-3,
    "init_lora_weights": "pissa",
    "no_output_kohya_format": True,
}
CONVOLUTIONS = {
    "init_lora_weights": "lora-ga",
    "lora_ga_samples": 4,
    "lora_layers": "convolutions",
    "mixed_precision": "bf16",
}
QUANTIZED = {"quantize": "nf4", "lora_layers": "all", "lora_alpha": 6}
NOISE = {"method": "flat-lora"}
HOLD = {
    "hold_unconditional": 4,
    "hold_unconditional_every": 3,  # after the resume
    "prior_prediction_weight": 1,
    "class_prompt": "an icon",
    "auxiliaries": "sample",
    "gradient_checkpointing": True,
    "noise_offset": 0.1,
}
SLOW_OPTIONS: list[dict[str, Any]] = [STREAM, ENCODERS, CONVOLUTIONS, QUANTIZED, NOISE, HOLD]
"""What a script adds to a method's life; methods, inits and optimizers are the contract's."""


@pytest.mark.parametrize(
    "values",
    [OPTIONS, *(pytest.param(values, marks=pytest.mark.slow) for values in SLOW_OPTIONS)],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_options_train_resume_exactly_and_a_checkpoint_is_exported_as_the_run(
    tmp_path, monkeypatch, values
):
    shared = {"max_train_steps": 3, "checkpointing_steps": 1, "train_batch_size": 1, **values}
    run = runs.train(tmp_path / "run", **shared)
    for name in ("compute", "mean_gradients"):  # a resumed run does not compute its init anew
        monkeypatch.setattr(f"bilora_diffusion.train.initialisation.{name}", pytest.fail)
    runs.resumes_exactly(run, 2, **shared)
    weights = runs.weights(run)
    assert all(torch.isfinite(value).all() for value in weights.values())
    models = {"unet"}
    if "text_encoder_lr" in values:
        models |= {"text_encoder", "text_encoder_2"}
    assert {key.split(".")[0] for key in weights} == models
    facts = runlog.read_run(run)["results"]["export"]
    assert facts["auxiliary_keys"] == 0
    assert facts["max_relative_difference"] < 1e-6
    # The file of these inits holds the first values too.
    rank = 8 if values.get("init_lora_weights") in ("pissa", "lora-ga") else 4
    assert {value.shape[0] for key, value in weights.items() if "lora_A" in key} == {rank}
    assert ("| rank of the file | 8 |" in (run / "README.md").read_text()) == (rank == 8)
    # flat-lora's noise depends on the length of the run.
    depends_on_length = values.get("method") == "flat-lora"
    changed = {"max_train_steps": 4} if depends_on_length else {"rank": 2}
    sentence = "max_train_steps was 3 and is 4" if depends_on_length else "rank"
    with pytest.raises(UserError, match=sentence):
        runs.train(tmp_path / "run-parts", **{**shared, **changed}, resume_from_checkpoint="latest")

    assert export([str(run), "--step", "3"]) == 0
    exported = run / "exports" / "step-3"
    assert runs.difference(exported, run) == 0
    facts = [inspect(folder / FILE_NAME).metadata for folder in (exported, run)]
    for key in ("bilora.steps", "bilora.original_alpha", "ss_network_dim", "sshs_model_hash"):
        assert facts[0].get(key) == facts[1].get(key)


@pytest.mark.slow
def test_an_early_step_in_a_format_and_refusals(tmp_path, capsys):
    run, early = runs.train_once(checkpointing_steps=1), tmp_path / "early.safetensors"
    assert export([str(run), "--step", "1", "--to", "kohya", "--output", str(early)]) == 0
    facts, last = inspect(early), inspect(run / "run.safetensors")
    assert (facts.format, facts.metadata["bilora.steps"]) == ("kohya", "1")
    assert facts.metadata["sshs_model_hash"] != last.metadata["sshs_model_hash"]
    full = runs.copied(run, tmp_path / "full")
    record = json.loads((full / "run.json").read_text())
    (full / "run.json").write_text(json.dumps({**record, "method": "full"}))
    capsys.readouterr()
    for arguments, words in (
        ([str(run), "--step", "7"], "1, 2"),
        ([str(run), "--step", "2", "--output", str(early), "--to", "kohya"], "exists"),
        ([str(full), "--step", "1"], "--max_train_steps"),
        ([str(tmp_path), "--step", "1"], "run.json"),
    ):
        assert export(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_prior_preservation_makes_and_uses_class_images(tmp_path):
    values = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class"}
    values |= {"class_prompt": "a flat icon of a rabbit", "num_class_images": 2}
    values |= {"train_batch_size": 1, "auxiliaries": "sample", "checkpointing_steps": 2}
    folder = runs.train(tmp_path / "run", **values)
    images = sorted((tmp_path / "class").glob("*.png"))
    assert len(images) == 2
    times = [file.stat().st_mtime_ns for file in images]
    free = runs.train(tmp_path / "free", **values, prior_loss_weight=0.0)
    assert [file.stat().st_mtime_ns for file in images] == times
    assert runs.column(folder, "loss") != runs.column(free, "loss")
    tensors = load_file(folder / "checkpoints" / "step-2" / "adapters.safetensors")
    assert sum("/auxiliary/" in key for key in tensors) == 23  # none of an image of the class
    plain = runs.train_once(train_batch_size=1)
    assert runs.column(free, "loss")[0] == pytest.approx(runs.column(plain, "loss")[0], rel=1e-5)


@pytest.mark.slow
def test_validation_images_and_heldout_loss_do_not_disturb_training(tmp_path):
    icons = runs.two_icons(tmp_path / "icons")
    shared = {**icons, "max_train_steps": 3, "train_batch_size": 1}
    skipped = {"validation_prompt": "a TOK icon", "skip_final_inference": True}
    skipped |= {"num_validation_images": 1, "validation_dataset": "none"}
    quiet = runs.train(tmp_path / "quiet", **{**shared, **skipped})
    evaluation = {
        "report_to": "tensorboard",
        "validation_prompt": "a TOK icon of a rabbit",
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "validation_epochs": 3,
        "validation_loss_steps": 2,
    }
    looked = runs.train(tmp_path / "looked", **shared, **evaluation)
    assert runs.difference(quiet, looked) == 0
    assert not list(quiet.rglob("validation/*/*.png"))
    assert len(list((looked / "validation").rglob("*.png"))) == 1
    rows = [row for row in runlog.read_metrics(looked) if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    for row in rows:
        levels = [value for key, value in row.items() if key.startswith(BY_LEVEL)]
        assert len(levels) == NOISE_LEVELS
        assert sum(levels) / NOISE_LEVELS == pytest.approx(row["heldout_loss"], rel=1e-5)
    assert runlog.read_run(looked)["results"]["heldout_loss"] > 0

    events = EventAccumulator(str(looked / "logs" / "dreambooth-bilora")).Reload()
    assert f"{BY_LEVEL}25" in events.Tags()["scalars"]
    (image,) = events.Images("validation")
    assert (image.step, image.width, image.height) == (3, 64, 64)


def test_on_a_cpu_freed_memory_is_there_for_the_next_step():
    engine.keep_freed_memory(torch.device("cpu"))
    faults = []
    for _ in range(2):
        torch.ones(2**24).sum()  # 64 MiB are 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[1] - faults[0] < 1000


@pytest.mark.slow
def test_in_fp16_steps_without_a_finite_loss_are_left_out(tmp_path, monkeypatch):
    """With a gradient scaler on the CPU; the run ends when no loss is finite any more."""
    build_accelerator, forward = command.build_accelerator, DreamBoothModule.forward
    build_optimizer = trainer.build_optimizer
    calls = -1  # the probe before the first step
    nonfinite_calls: set[int] = set()

    def with_scaler(cfg):
        accelerator = build_accelerator(cfg)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    def with_nan(self, inputs):
        nonlocal calls
        losses = forward(self, inputs) * (float("nan") if calls in nonfinite_calls else 1)
        calls += 1
        return losses

    def in_fp16(cfg, groups):
        return build_optimizer(dataclasses.replace(cfg, mixed_precision="fp16"), groups)

    monkeypatch.setattr(trainer, "build_optimizer", in_fp16)
    monkeypatch.setattr(trainer, "MAX_NONFINITE_STEPS", 3)
    monkeypatch.setattr(command, "build_accelerator", with_scaler)
    monkeypatch.setattr(DreamBoothModule, "forward", with_nan)
    shared = {"gradient_accumulation_steps": 1, "train_batch_size": 1, "max_train_steps": 5}
    nonfinite_calls = {1, 2}
    folder = runs.train(tmp_path / "some", **shared)
    assert [row["step"] for row in runlog.read_metrics(folder) if row["skipped"]] == [2, 3]
    assert all(torch.isfinite(value).all() for value in runs.weights(folder).values())
    calls, nonfinite_calls = -1, {1, 2, 3, 4}
    with pytest.raises(TrainingError, match="step 5 is not finite"):
        runs.train(tmp_path / "all", **shared)
    assert runlog.read_run(tmp_path / "all")["status"] == "failed"


@pytest.mark.slow
def test_a_run_goes_on_on_a_smaller_card(tmp_path):
    """With checkpointing, other workers, and without kept latents and the images of before."""
    shared = {"checkpointing_steps": 1, "validation_prompt": "a TOK icon", "random_flip": True}
    run = runs.train(tmp_path / "run", **shared, num_validation_images=1)
    shared |= {"gradient_checkpointing": True, "cache_latents": "no", "dataloader_num_workers": 2}
    parts = runs.resumed(run, 1, **shared, num_validation_images=0)
    assert runs.column(run, "digest") == runs.column(parts, "digest")
    assert runs.difference(run, parts) < 1e-6
    assert not re.search(r"validation/step-\d", (parts / "README.md").read_text())


def test_full_fine_tuning_leaves_a_unet_that_loads(tmp_path):
    folder = runs.train(tmp_path / "run", method="full", learning_rate=1e-5)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    base = StableDiffusionXLPipeline.from_pretrained(pipeline_dir()).unet.float()
    pairs = zip(unet.parameters(), base.parameters(), strict=True)
    assert 0 < max((a - b).abs().max() for a, b in pairs) < 1e-4
    report = runlog.read_run(folder)["results"]["export"]["unet"]
    assert report == {"weights": 17317128, "readback_difference": 0.0}
    assert "subfolder='unet'" in (folder / "README.md").read_text()
    assert len({file.stat().st_mode for file in (folder / "unet").iterdir()}) == 1


@pytest.mark.slow
def test_class_images_see_no_samples_auxiliary(tmp_path):
    """Beside images of the class the auxiliaries move as without them."""
    shared = {"auxiliaries": "sample", "rho": 0.5, "checkpointing_steps": 1, "max_train_steps": 3}
    icons = runs.two_icons(tmp_path / "icons")
    shared |= {**icons, "validation_dataset": "none", "train_batch_size": 2}
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": icons["validation_dataset"],
        "class_prompt": "an icon",
        "num_class_images": 2,
        "prior_loss_weight": 1e-9,
    }
    plain = runs.train(tmp_path / "plain", **shared)
    with_class = runs.train(tmp_path / "with_class", **shared, **prior)
    tensors, tensors_with_class = (
        load_file(run / "checkpoints/step-3/adapters.safetensors") for run in (plain, with_class)
    )
    auxiliaries = [key for key in tensors if "/auxiliary/" in key]
    assert len(auxiliaries) == 2
    for key in auxiliaries:
        # Adam makes a step of the rounding of a small gradient; kernels round by the processor.
        torch.testing.assert_close(tensors[key], tensors_with_class[key], rtol=1e-3, atol=5e-5)
