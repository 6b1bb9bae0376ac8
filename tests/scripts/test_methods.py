"""Every method through the script on the miniature, with every option that the table allows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from bilora_diffusion.config import combinations
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import create, names
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run import runlog
from tests.scripts.runs import column, difference, weights

Train = Callable[..., Path]
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "mini.yaml"
RATE = 2e-4  # Table A8's; Adam turns rounding into steps of this size
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "lora-ga": {"init_lora_weights": "lora-ga", "lora_ga_samples": 2},
    "dora": {"use_dora": True},
    "nf4": {"quantize": "nf4"},
    "ema": {"use_ema": True, "ema_decay": 0.9},
    "pissa-dora-ema": {"init_lora_weights": "pissa", "use_dora": True, "use_ema": True},
}


def allowed(method: str, option: str) -> bool:
    return combinations.refused({"method": method, **OPTIONS[option]}) is None


PAIRS = [(method, option) for method in names() for option in OPTIONS if allowed(method, option)]


def recipe(method: str, option: str) -> dict[str, Any]:
    return {
        **{"config": RECIPE, "method": method, "validation_loss_steps": 0},
        **{"checkpointing_steps": 2, "learning_rate": RATE},
        **OPTIONS[option],
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "option"), PAIRS)
def test_the_recipe_trains(train: Train, tmp_path: Path, method: str, option: str) -> None:
    folder = train(
        tmp_path / "run", **recipe(method, option), max_train_steps=1, train_batch_size=1
    )
    assert all(value.isfinite().all() for value in weights(folder).values())
    assert runlog.read_run(folder)["results"]["export"]


@pytest.mark.parametrize(
    ("method", "option"),
    [(m, o) for m, o in PAIRS if o == "default" or (m == "bilora" and "-" in o)],
)
def test_it_resumes_exactly(train: Train, tmp_path: Path, method: str, option: str) -> None:
    shared = {**recipe(method, option), "max_train_steps": 3, "train_batch_size": 1}
    whole = train(tmp_path / "whole", **shared)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "metrics.jsonl").write_text(
        "".join((parts / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
    )
    train(parts, **shared, resume_from_checkpoint="latest")
    assert difference(whole, parts) == 0
    for key in ("loss", "digest", "grad_norm"):
        assert column(whole, key) == column(parts, key)
    assert [row["step"] for row in runlog.read_metrics(parts)] == [1, 2, 3]


@pytest.mark.parametrize("method", names())
def test_micro_batches_do_not_change_the_result(train: Train, tmp_path: Path, method: str) -> None:
    folders = [
        train(
            tmp_path / f"{size}",
            method=method,
            train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_train_steps=2,
            learning_rate=5e-5,
        )
        for size in (8, 4, 1)
    ]
    # Adam turns rounding into a share of the rate, up to 1.1e-6 on some processors; other inputs or
    # noise would change a weight by whole rates. Of full fine-tuning's 17 million gradients some
    # are so small that rounding turns their sign.
    bound = 2 * 2 * 5e-5 if method == "full" else 2e-6
    assert difference(folders[0], folders[1]) < bound
    assert difference(folders[0], folders[2]) < bound
    assert column(folders[0], "digest") == column(folders[2], "digest")


def test_all_methods_see_the_same(train: Train, tmp_path: Path) -> None:
    folders = [train(tmp_path / method, method=method) for method in names()]
    digests = [column(folder, "digest") for folder in folders]
    assert all(seen == digests[0] for seen in digests)
    first = {column(folder, "loss")[0] for folder in folders if "flat" not in folder.name}
    assert max(first) - min(first) < 1e-6  # adapters start as the base; the noise is Flat-LoRA's


def test_full_fine_tuning_leaves_a_unet_that_loads(train: Train, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", method="full", learning_rate=1e-5)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_dir(), unet=unet)
    base = StableDiffusionXLPipeline.from_pretrained(pipeline_dir()).unet.float()
    moved = [
        (a - b).abs().max()
        for a, b in zip(pipeline.unet.parameters(), base.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1e-4
    report = runlog.read_run(folder)["results"]["export"]["unet"]
    assert report == {"weights": 17317128, "readback_difference": 0.0}
    assert "subfolder='unet'" in (folder / "README.md").read_text()
    assert len({file.stat().st_mode for file in (folder / "unet").iterdir()}) == 1


def test_full_fine_tuning_does_not_replace_foreign_models(train: Train, tmp_path: Path) -> None:
    foreign = tmp_path / "run" / "unet"
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text("{}")
    with pytest.raises(UserError, match="give another --output_dir"):
        train(tmp_path / "run", method="full")
    with pytest.raises(UserError, match="give another --output_dir"):
        train(tmp_path / "run", method="full", overwrite_output_dir=True)
    assert [path.name for path in foreign.iterdir()] == ["config.json"]


def test_the_average_is_exported_and_both_are_kept(train: Train, tmp_path: Path) -> None:
    shared = {"max_train_steps": 6, "checkpointing_steps": 6, "method": "lora"}
    plain = train(tmp_path / "plain", **shared)
    averaged = train(tmp_path / "averaged", **shared, use_ema=True, ema_decay=0.5)
    assert column(plain, "loss") == column(averaged, "loss")
    assert difference(plain, averaged) > 0
    from safetensors.torch import load_file

    stored = load_file(averaged / "checkpoints" / "step-6" / "adapters.safetensors")
    kept = {key: value for key, value in stored.items() if not key.startswith("average/")}
    trained = load_file(plain / "checkpoints" / "step-6" / "adapters.safetensors")
    assert kept.keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in kept.items())
    assert len(stored) == 2 * len(kept)


def test_a_schedule_does_not_go_on_beyond_its_length(train: Train, tmp_path: Path) -> None:
    """Flat-LoRA's noise depends on how long the run is, so a longer one is another run."""
    assert create("flat-lora").depends_on_length
    train(tmp_path / "run", method="flat-lora", checkpointing_steps=2)
    longer = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="num_steps was 2 and is 4"):
        train(tmp_path / "run", method="flat-lora", **longer)
