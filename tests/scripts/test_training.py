"""Whole runs on the miniature: what the image script and the loop promise whatever the method."""

import dataclasses
import json
import resource
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilora_diffusion.core.choices import NOISE_LEVELS
from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.export.cli import main as export
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.image.denoising import DreamBoothModule
from bilora_diffusion.image.heldout import BY_LEVEL
from bilora_diffusion.methods import get, names
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run import runlog
from bilora_diffusion.train import command, loop, setup
from tests.scripts import runs


def test_arms_are_paired_and_seeds_are_not(tmp_path):
    shared = {"max_train_steps": 3, "train_batch_size": 1}
    plain, folder = runs.train_once(method="lora", **shared), runs.train_once(rho=0.01, **shared)
    other = runs.train(tmp_path, method="lora", seed=1, train_batch_size=1)
    digests = [runs.column(run, "digest") for run in (plain, folder, other)]
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


class Asked(TorchFunctionMode):
    """Notes what asks a tensor for its numbers, for which a GPU's queue would be waited for."""

    names: tuple[str, ...] = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__):
            Asked.names += (func.__name__,)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["bilora", pytest.param("lora-sam", marks=pytest.mark.slow)])
def test_no_number_is_asked_for_before_a_step_is_made(tmp_path, monkeypatch, method):
    kind = get(method)
    step, steps = kind.step, []

    def watched(*args):
        with Asked():
            steps.append(step(*args))
        return steps[-1]

    monkeypatch.setattr(kind, "step", watched)
    monkeypatch.setattr(Asked, "names", ())
    runs.train(tmp_path, method=method, train_batch_size=1, gradient_accumulation_steps=2)
    assert len(steps) == 2
    assert Asked.names == ()


PISSA = {"init_lora_weights": "pissa"}
GA = {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}
TEXT_ENCODERS = {"train_text_encoder": True, "text_encoder_lr": 1e-3}
OPTIONS = {
    **{"use_dora": True, "lora_dropout": 0.2, "report_to": "tensorboard", "lora_alpha": 6},
    **{"use_ema": True, "ema_decay": 0.5},
}
SLOW: list[dict[str, Any]] = [
    {
        **{"init_lora_weights": "gaussian", "lora_alpha": 6, "scale_lr": True},
        **{"random_flip": True, "cache_latents": "no", "dataloader_num_workers": 1},
        **{"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        **{"trigger_word": "sks", "shuffle_tags": True, "caption_dropout": 0.5},
    },
    {"mixed_precision": "bf16", "snr_gamma": 5.0, "gradient_checkpointing": True},
    {**TEXT_ENCODERS, **PISSA, "no_output_kohya_format": True},
    {"optimizer": "prodigy", "learning_rate": 1.0, "do_edm_style_training": True},
    {"use_8bit_adam": True, "mixed_precision": "bf16", **TEXT_ENCODERS},
    {**GA, "lora_layers": "convolutions"},
    {"quantize": "nf4", "lora_layers": "all", "lora_alpha": 6},
    {"method": "lora-sam"},
    {"method": "flat-lora"},
]
MATRIX: list[dict[str, Any]] = [
    {**PISSA, "use_dora": True, "lora_alpha": 6, "use_ema": True},
    {"lora_layers": "attention+feed-forward"},
    {**PISSA, "lora_layers": "all-linear", "mixed_precision": "bf16"},
    {**PISSA, "lora_layers": "convolutions", "use_dora": True},
    {"method": "flat-lora", "lora_layers": "convolutions"},
    {**GA, "method": "lora", **TEXT_ENCODERS, "gradient_checkpointing": True},
    {"quantize": "nf4", "use_dora": True, **TEXT_ENCODERS},
    {"quantize": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": True},
    *({"method": name} for name in names() if name not in ("bilora", "full")),
]


@pytest.mark.parametrize(
    "values",
    [
        OPTIONS,
        *(pytest.param(values, marks=pytest.mark.slow) for values in SLOW),
        *(pytest.param(values, marks=pytest.mark.matrix) for values in MATRIX),
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_options_train_resume_exactly_and_a_checkpoint_is_exported_as_the_run(
    tmp_path, monkeypatch, values
):
    shared = {"max_train_steps": 3, "checkpointing_steps": 1, "train_batch_size": 1, **values}
    whole = runs.train(tmp_path / "whole", **shared)
    for name in ("compute", "mean_gradients"):  # a resumed run does not compute its init anew
        monkeypatch.setattr(f"bilora_diffusion.train.initialisation.{name}", pytest.fail)
    runs.resumes_exactly(whole, 2, **shared)
    file = runs.weights(whole)
    assert all(torch.isfinite(value).all() for value in file.values())
    if set(values) == {"method"}:  # what is seen does not depend on it
        plain = runs.train_once(method="lora", max_train_steps=3, train_batch_size=1)
        assert runs.column(whole, "digest") == runs.column(plain, "digest")
    models = {"unet", *(["text_encoder", "text_encoder_2"] if "text_encoder_lr" in values else [])}
    assert {key.split(".")[0] for key in file} == models
    exported = runlog.read_run(whole)["results"]["export"]
    assert exported["auxiliary_keys"] == 0
    assert exported["max_relative_difference"] < 1e-6
    # Of these the first values go too.
    rank = 8 if values.get("init_lora_weights") in ("pissa", "lora-ga") else 4
    assert {value.shape[0] for key, value in file.items() if "lora_A" in key} == {rank}
    assert ("| rank of the file | 8 |" in (whole / "README.md").read_text()) == (rank == 8)
    flat = values.get("method") == "flat-lora"  # whose noise depends on how long the run is
    other = {**shared, **({"max_train_steps": 4} if flat else {"rank": 2})}
    with pytest.raises(UserError, match="max_train_steps was 3 and is 4" if flat else "rank"):
        runs.train(tmp_path / "whole-parts", **other, resume_from_checkpoint="latest")

    assert export([str(whole), "--step", "3"]) == 0
    made = whole / "exports" / "step-3"
    assert runs.difference(made, whole) == 0
    facts = [inspect(folder / FILE_NAME).metadata for folder in (made, whole)]
    for key in ("bilora.steps", "bilora.original_alpha", "ss_network_dim", "sshs_model_hash"):
        assert facts[0].get(key) == facts[1].get(key)


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
    for arguments, said in (
        ([str(run), "--step", "7"], "1, 2"),
        ([str(run), "--step", "1", "--output", str(early), "--to", "kohya"], "exists"),
        ([str(full), "--step", "1"], "--max_train_steps"),
        ([str(tmp_path), "--step", "1"], "run.json"),
    ):
        assert export(arguments) == 2
        assert said in capsys.readouterr().err


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
    held = load_file(folder / "checkpoints" / "step-2" / "adapters.safetensors")
    assert sum("/auxiliary/" in key for key in held) == 23  # none of an image of the class
    plain = runs.train_once(train_batch_size=1)
    assert runs.column(free, "loss")[0] == pytest.approx(runs.column(plain, "loss")[0], rel=1e-5)


def test_validation_images_and_heldout_loss_do_not_disturb_training(tmp_path):
    icons = runs.two_icons(tmp_path / "icons")
    shared = {**icons, "max_train_steps": 3, "train_batch_size": 1}
    quiet = runs.train(tmp_path / "quiet", **{**shared, "validation_dataset": "none"})
    shown = {"report_to": "tensorboard", "validation_prompt": "a TOK icon of a rabbit"}
    shown |= {"num_validation_images": 1, "validation_num_inference_steps": 4}
    measured = {"validation_epochs": 3, "validation_loss_steps": 2}
    looked = runs.train(tmp_path / "looked", **shared, **shown, **measured)
    assert runs.difference(quiet, looked) == 0
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
    (shown,) = events.Images("validation")
    assert (shown.step, shown.width, shown.height) == (3, 64, 64)


def test_on_a_cpu_freed_memory_is_there_for_the_next_step():
    setup.keep_freed_memory(torch.device("cpu"))
    faults = []
    for _ in range(2):
        torch.ones(2**24).sum()  # 64 MiB are 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[1] - faults[0] < 1000


def test_in_fp16_steps_without_a_finite_loss_are_left_out(tmp_path, monkeypatch):
    """With a gradient scaler on the CPU; the run ends when no loss is finite any more."""
    build, whole = command.build_accelerator, DreamBoothModule.forward
    optimizer = loop.build_optimizer

    def with_scaler(cfg):
        accelerator = build(cfg)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    def forward(self, inputs):
        calls.append(len(calls) - 1)  # -1 is the probe before the first step
        return whole(self, inputs) * (float("nan") if calls[-1] in spoilt else 1)

    def in_fp16(cfg, groups):
        return optimizer(dataclasses.replace(cfg, mixed_precision="fp16"), groups)

    monkeypatch.setattr(loop, "build_optimizer", in_fp16)
    monkeypatch.setattr(command, "build_accelerator", with_scaler)
    monkeypatch.setattr(DreamBoothModule, "forward", forward)
    shared = {"gradient_accumulation_steps": 1, "train_batch_size": 1, "max_train_steps": 14}
    calls: list[int] = []
    spoilt = {1, 2, 4}
    folder = runs.train(tmp_path / "some", **{**shared, "max_train_steps": 6})
    assert [row["step"] - 1 for row in runlog.read_metrics(folder) if row["skipped"]] == [1, 2, 4]
    assert all(torch.isfinite(value).all() for value in runs.weights(folder).values())
    calls.clear()
    spoilt = set(range(2, 100))
    with pytest.raises(
        TrainingError, match=f"step {2 + loop.MAX_NONFINITE_STEPS + 1} is not finite"
    ):
        runs.train(tmp_path / "all", **shared)
    assert runlog.read_run(tmp_path / "all")["status"] == "failed"


@pytest.mark.slow
def test_a_run_goes_on_on_a_smaller_card(tmp_path):
    """With checkpointing, other workers, and without kept latents and the images of before."""
    shared = {"checkpointing_steps": 1, "validation_prompt": "a TOK icon", "random_flip": True}
    whole = runs.train(tmp_path / "whole", **shared, num_validation_images=1)
    shared |= {"gradient_checkpointing": True, "cache_latents": "no", "dataloader_num_workers": 2}
    parts = runs.resumed(whole, 1, **shared, num_validation_images=0)
    assert runs.column(whole, "digest") == runs.column(parts, "digest")
    assert runs.difference(whole, parts) < 1e-6
    assert "validation/" not in (parts / "README.md").read_text()


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
    own = runs.two_icons(tmp_path / "own")
    prior = {"with_prior_preservation": True, "class_data_dir": own["validation_dataset"]}
    prior |= {"class_prompt": "an icon", "num_class_images": 2, "prior_loss_weight": 1e-9}
    shared |= own | {"validation_dataset": "none", "train_batch_size": 2}
    plain, beside = (
        runs.train(tmp_path / name, **shared, **further)
        for name, further in (("plain", {}), ("beside", prior))
    )
    kept = [load_file(run / "checkpoints/step-3/adapters.safetensors") for run in (plain, beside)]
    moved = [key for key in kept[0] if "/auxiliary/" in key]
    assert len(moved) == 2
    for key in moved:
        # Adam makes a step of the rounding of a small gradient; kernels round by the processor.
        torch.testing.assert_close(kept[0][key], kept[1][key], rtol=1e-3, atol=5e-5)
