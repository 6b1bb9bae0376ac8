"""Complete runs on the miniature: promises of the image script and of the loop for any method."""

import dataclasses
import json
import re
import resource
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
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
from tests.scripts.runs import (
    column,
    copied,
    difference,
    resumed,
    resumes_exactly,
    train,
    train_once,
    two_icons,
    weights,
)


@pytest.mark.slow
def test_methods_are_paired_and_seeds_are_not(tmp_path):
    shared = {"max_train_steps": 3, "train_batch_size": 1}
    lora = train_once(method="lora", **shared)
    bilora = train_once(rho=0.01, **shared)
    reseeded = train(tmp_path, method="lora", seed=1, train_batch_size=1, max_train_steps=1)
    digests = column(lora, "digest")
    assert digests == column(bilora, "digest")
    assert len(set(digests)) == 3
    assert column(reseeded, "digest")[0] not in digests
    # The auxiliary starts at zero, so the first loss equals LoRA's exactly; later losses differ.
    lora_losses = column(lora, "loss")
    bilora_losses = column(bilora, "loss")
    assert lora_losses[0] == bilora_losses[0]
    assert lora_losses[2] != bilora_losses[2]
    # The auxiliary stays in its ball and is not in the file.
    assert max(column(bilora, "auxiliary_norm")) <= 0.01 * (1 + 1e-6)
    assert max(column(bilora, "auxiliary_norm_before")) > 0.01
    assert not [key for key in weights(bilora) if "auxiliary" in key]
    report = runlog.read_run(bilora)["results"]["export"]
    assert report["kohya_max_relative_difference"] < 1e-6
    assert inspect(bilora / "run.safetensors").format == "kohya"


class NumberReads(TorchFunctionMode):
    """Mode that records each read of a tensor's values; on a GPU, a read waits for its queue."""

    names: tuple[str, ...] = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__):
            NumberReads.names += (func.__name__,)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_tensor_value(tmp_path, monkeypatch):
    method = get("bilora")
    step = method.step
    losses = []

    def watched_step(*arguments):
        with NumberReads():
            losses.append(step(*arguments))
        return losses[-1]

    monkeypatch.setattr(method, "step", watched_step)
    monkeypatch.setattr(NumberReads, "names", ())
    train(tmp_path, train_batch_size=1, gradient_accumulation_steps=2)
    assert len(losses) == 2
    assert NumberReads.names == ()


OPTIONS = {
    "use_dora": True,
    "lora_dropout": 0.2,
    "report_to": "tensorboard",
    "lora_alpha": 6,
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
    "hold_unconditional_every": 3,  # applies only after the resume
    "prior_prediction_weight": 1,
    "class_prompt": "an icon",
    "gradient_checkpointing": True,
    "noise_offset": 0.1,
}
GUIDED = {**ENCODERS, "init_lora_weights": "default", "guided_target": 2, "caption_dropout": 0.3}
GUIDED_NF4 = {"guided_target": 2, "quantize": "nf4", "method": "lora-sam"}
SLOW_OPTIONS: list[dict[str, Any]] = [STREAM, ENCODERS, CONVOLUTIONS, QUANTIZED, NOISE, HOLD]
SLOW_OPTIONS += [GUIDED, GUIDED_NF4]
"""Options of the script; tests/contract tests methods, initializations and optimizers."""
OPTION_CASES = [pytest.param(OPTIONS)]
OPTION_CASES += [pytest.param(options, marks=pytest.mark.slow) for options in SLOW_OPTIONS]


@pytest.mark.parametrize(
    "options", OPTION_CASES, ids=lambda options: "-".join(map(str, options.values()))
)
def test_runs_with_options_resume_exactly_and_a_checkpoint_is_exported_like_the_run(
    tmp_path, monkeypatch, options
):
    shared = {"max_train_steps": 3, "checkpointing_steps": 1, "train_batch_size": 1, **options}
    run = train(tmp_path / "run", **shared)
    for name in ("compute", "mean_gradients"):  # a resumed run must not initialize again
        monkeypatch.setattr(f"bilora_diffusion.train.initialisation.{name}", pytest.fail)
    resumes_exactly(run, 2, **shared)

    tensors = weights(run)
    # With these initializations, the file holds the initial values too, to fit the original base.
    holds_initial = options.get("init_lora_weights") in ("pissa", "lora-ga")
    rank = 8 if holds_initial else 4
    for key, weight in tensors.items():
        assert torch.isfinite(weight).all()
        assert "lora_A" not in key or weight.shape[0] == rank
    assert ("| rank of the file | 8 |" in (run / "README.md").read_text()) == holds_initial
    models = {"unet"}
    if "text_encoder_lr" in options:
        models |= {"text_encoder", "text_encoder_2"}
    assert {key.split(".")[0] for key in tensors} == models
    report = runlog.read_run(run)["results"]["export"]
    assert report["max_relative_difference"] < 1e-6

    if options is NOISE:
        # A run can be extended, unless its noise depends on the number of steps.
        longer = {**shared, "max_train_steps": 4}
        with pytest.raises(UserError, match="max_train_steps was 3 and is 4"):
            train(tmp_path / "run-parts", **longer, resume_from_checkpoint="latest")

    assert export([str(run), "--step", "3"]) == 0
    exported = run / "exports" / "step-3"
    assert difference(exported, run) == 0
    run_facts = inspect(run / FILE_NAME).metadata
    step_facts = inspect(exported / FILE_NAME).metadata
    for key in ("bilora.steps", "bilora.original_alpha", "ss_network_dim", "sshs_model_hash"):
        assert step_facts.get(key) == run_facts.get(key)


@pytest.mark.slow
def test_an_early_step_is_exported_and_bad_exports_are_refused(tmp_path, capsys):
    run = train_once(checkpointing_steps=1)
    early = tmp_path / "early.safetensors"
    assert export([str(run), "--step", "1", "--to", "kohya", "--output", str(early)]) == 0
    contents = inspect(early)
    assert contents.format == "kohya"
    assert contents.metadata["bilora.steps"] == "1"
    last_hash = inspect(run / "run.safetensors").metadata["sshs_model_hash"]
    assert contents.metadata["sshs_model_hash"] != last_hash

    full = copied(run, tmp_path / "full")
    record = json.loads((full / "run.json").read_text())
    (full / "run.json").write_text(json.dumps({**record, "method": "full"}))
    capsys.readouterr()
    for line, part in (
        (f"{run} --step 7", "1, 2"),
        (f"{run} --step 2 --output {early} --to kohya", "exists"),
        (f"{full} --step 1", "--max_train_steps"),
        (f"{tmp_path} --step 1", "run.json"),
    ):
        assert export(line.split()) == 2
        assert part in capsys.readouterr().err


@pytest.mark.slow
def test_prior_preservation_generates_and_uses_class_images(tmp_path):
    values = {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a flat icon of a rabbit",
        "num_class_images": 2,
        "train_batch_size": 1,
    }
    folder = train(tmp_path / "run", **values)
    images = sorted((tmp_path / "class").glob("*.png"))
    assert len(images) == 2
    times = [file.stat().st_mtime_ns for file in images]
    free = train(tmp_path / "free", **values, prior_loss_weight=0.0)
    assert [file.stat().st_mtime_ns for file in images] == times
    assert column(folder, "loss") != column(free, "loss")
    # With weight 0, the class images add nothing to the first loss.
    plain = train_once(train_batch_size=1)
    assert column(free, "loss")[0] == pytest.approx(column(plain, "loss")[0], rel=1e-5)


@pytest.mark.slow
def test_validation_images_and_heldout_loss_do_not_change_the_training(tmp_path):
    icons = two_icons(tmp_path / "icons")
    shared = {**icons, "max_train_steps": 3, "train_batch_size": 1}
    no_evaluation = {
        "validation_prompt": "a TOK icon",
        "skip_final_inference": True,
        "num_validation_images": 1,
        "validation_dataset": "none",
    }
    quiet = train(tmp_path / "quiet", **{**shared, **no_evaluation})
    evaluation = {
        "report_to": "tensorboard",
        "validation_prompt": "a TOK icon of a rabbit",
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "checkpointing_steps": 2,
        "validation_loss_steps": 2,
    }
    evaluated = train(tmp_path / "evaluated", **shared, **evaluation)
    assert difference(quiet, evaluated) == 0
    assert not list(quiet.rglob("validation/*/*.png"))
    # Images are sampled at each checkpoint and at the end.
    folders = sorted(path.parent.name for path in evaluated.rglob("validation/*/*.png"))
    assert folders == ["step-2", "step-3"]
    rows = [row for row in runlog.read_metrics(evaluated) if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    for row in rows:
        # The held-out loss is the mean over the noise levels.
        levels = [value for key, value in row.items() if key.startswith(BY_LEVEL)]
        assert len(levels) == NOISE_LEVELS
        assert sum(levels) / NOISE_LEVELS == pytest.approx(row["heldout_loss"], rel=1e-5)
    assert runlog.read_run(evaluated)["results"]["heldout_loss"] > 0

    events = EventAccumulator(str(evaluated / "logs" / "dreambooth-bilora")).Reload()
    assert f"{BY_LEVEL}25" in events.Tags()["scalars"]
    images = events.Images("validation")
    assert [(image.step, image.width, image.height) for image in images] == [
        (2, 64, 64),
        (3, 64, 64),
    ]


def test_memory_freed_on_a_cpu_is_kept_for_the_next_step():
    engine.keep_freed_memory(torch.device("cpu"))
    faults = []
    for _ in range(2):
        torch.ones(2**24).sum()  # 64 MiB are 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[1] - faults[0] < 1000


@pytest.mark.slow
def test_fp16_steps_without_a_finite_loss_are_skipped(tmp_path, monkeypatch):
    """The gradient scaler is on the CPU. A run fails after too many of these steps in a row."""
    build_accelerator = command.build_accelerator
    build_optimizer = trainer.build_optimizer
    forward = DreamBoothModule.forward
    calls = -1  # -1 is the probe before the first step
    nonfinite_calls: set[int] = set()

    def with_scaler(cfg):
        accelerator = build_accelerator(cfg)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    def with_nan(self, inputs):
        nonlocal calls
        losses = forward(self, inputs)
        if calls in nonfinite_calls:
            losses = losses * float("nan")
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
    folder = train(tmp_path / "some", **shared)
    assert [row["step"] for row in runlog.read_metrics(folder) if row["skipped"]] == [2, 3]
    assert all(torch.isfinite(value).all() for value in weights(folder).values())

    calls = -1
    nonfinite_calls = {1, 2, 3, 4}
    with pytest.raises(TrainingError, match="step 5 is not finite"):
        train(tmp_path / "all", **shared)
    assert runlog.read_run(tmp_path / "all")["status"] == "failed"

    # Losses are finite and gradients are not: the scaler skips the steps.
    calls = -1
    nonfinite_calls = set()

    def with_infinite_gradients(self, inputs):
        losses = with_nan(self, inputs)
        if calls > 0:  # not in the probe
            losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(DreamBoothModule, "forward", with_infinite_gradients)
    with pytest.raises(TrainingError, match="gradients of the last 5 steps were not finite"):
        train(tmp_path / "whole", **shared)  # each step is skipped
    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 2)
    calls = -1
    with pytest.raises(TrainingError, match="gradients of the last 3 steps were not finite"):
        train(tmp_path / "skipped", **shared)
    assert not list(tmp_path.rglob("[sw][kh]*/*.safetensors"))


@pytest.mark.slow
def test_a_run_resumes_on_a_smaller_gpu(tmp_path):
    """The resumed run has gradient checkpointing, more workers, no cached latents and no images."""
    shared = {"checkpointing_steps": 1, "validation_prompt": "a TOK icon", "random_flip": True}
    run = train(tmp_path / "run", **shared, num_validation_images=1)
    smaller = {"gradient_checkpointing": True, "cache_latents": "no", "dataloader_num_workers": 2}
    parts = resumed(run, 1, **shared, **smaller, num_validation_images=0)
    assert column(run, "digest") == column(parts, "digest")
    assert difference(run, parts) < 1e-6
    assert not re.search(r"validation/step-\d", (parts / "README.md").read_text())


@pytest.mark.slow
def test_full_fine_tuning_exports_a_unet_that_loads(tmp_path):
    folder = train(tmp_path / "run", method="full", learning_rate=1e-5)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    base = StableDiffusionXLPipeline.from_pretrained(pipeline_dir()).unet.float()
    changes = []
    for weight, base_weight in zip(unet.parameters(), base.parameters(), strict=True):
        changes.append((weight - base_weight).abs().max())
    assert 0 < max(changes) < 1e-4  # two steps of Adam at a rate of 1e-5
    report = runlog.read_run(folder)["results"]["export"]["unet"]
    assert report == {"weights": 17317128, "readback_difference": 0.0}
    assert "subfolder='unet'" in (folder / "README.md").read_text()
    assert len({file.stat().st_mode for file in (folder / "unet").iterdir()}) == 1
