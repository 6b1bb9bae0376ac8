"""The text script's options: the tables' defaults, and spellings of other scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.adapters import ALL_LINEAR
from bilora_diffusion.text.config import TextConfig, parse_text


def parsed(*argv: str) -> TextConfig:
    return parse_text(["--model_name_or_path", "smollm2", "--task", "sst2", *argv])


def test_the_defaults_are_those_of_the_papers_tables() -> None:
    cfg = parsed()
    assert (cfg.rank, cfg.lora_alpha, cfg.learning_rate) == (8, 16.0, 5e-4)
    assert (cfg.lr_scheduler, cfg.warmup_ratio, cfg.num_train_epochs) == ("cosine", 0.03, 3)
    assert (cfg.rho, cfg.method, cfg.adam_weight_decay) == (0.05, "bilora", 0.0)
    assert (cfg.max_length, cfg.task_type, cfg.template) == (256, "auto", "auto")
    assert cfg.max_train_steps is None
    assert cfg.targets == ALL_LINEAR
    radii = {m: parsed("--method", m).rho for m in ("lora", "lora-sam", "flat-lora")}
    assert radii == {"lora": None, "lora-sam": 0.01, "flat-lora": 0.05}
    completed = parsed("--scale_lr").completed(2, "causal")
    assert (completed.task_type, completed.learning_rate) == ("causal", 5e-4 * 8 * 2)


@pytest.mark.parametrize(
    ("spelling", "name", "value"),
    [
        ("model_revision", "revision", "main"),
        ("max_seq_length", "max_length", 99),
        ("max_source_length", "max_length", 99),
        ("max_validation_samples", "max_eval_samples", 9),
        ("per_device_train_batch_size", "train_batch_size", 3),
        ("per_device_eval_batch_size", "eval_batch_size", 3),
        ("max_steps", "max_train_steps", 7),
        ("lr_scheduler_type", "lr_scheduler", "linear"),
        ("warmup_steps", "lr_warmup_steps", 5),
        ("weight_decay", "adam_weight_decay", 0.1),
        ("eval_steps", "validation_loss_steps", 5),
        ("save_steps", "checkpointing_steps", 5),
        ("max_new_tokens", "generation_max_new_tokens", 5),
        ("lora_r", "rank", 2),
    ],
)
def test_other_scripts_spellings(spelling: str, name: str, value: Any) -> None:
    assert getattr(parsed(f"--{spelling}", str(value)), name) == value
    assert getattr(parsed(f"--{name}", str(value)), name) == value


def test_target_modules_may_be_several() -> None:
    assert parsed("--lora_target_modules", "q", "v").targets == ("q", "v")


@pytest.mark.parametrize(
    ("argv", "steps", "warm"),
    [
        ((), 100, 3),
        ((), 101, 4),  # rounded up, as Transformers does
        (("--warmup_ratio", "0"), 100, 0),
        (("--warmup_ratio", "0.5"), 10, 5),
        (("--lr_warmup_steps", "7"), 100, 7),
        (("--lr_scheduler", "constant"), 100, 0),
    ],
)
def test_warm_up_as_a_share_or_in_steps(argv: tuple[str, ...], steps: int, warm: int) -> None:
    assert parsed(*argv).warmup_steps(steps) == warm


def test_steps_take_the_place_of_epochs() -> None:
    cfg = parsed("--max_train_steps", "10")
    assert (cfg.max_train_steps, cfg.num_train_epochs) == (10, None)


def test_the_record_leads_back_to_the_same_configuration(tmp_path: Path) -> None:
    cfg = parsed("--lora_target_modules", "q", "v", "--packing", "--rho", "0.1")
    values = json.loads(json.dumps(cfg.to_dict()))
    recipe = tmp_path / "recipe.yaml"
    kept = {key: value for key, value in values.items() if value is not None}
    kept = {key: value for key, value in kept.items() if key not in ("num_train_epochs", "config")}
    recipe.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in kept.items()))
    again = parse_text(["--config", str(recipe)])
    assert again.to_dict() == {**values, "config": str(recipe)}
    assert "hub_token" not in values


def test_what_does_not_touch_learning_may_change() -> None:
    before = parsed().fingerprint()
    free = ("--eval_steps", "5", "--max_eval_samples", "9", "--eval_batch_size", "2")
    assert parsed(*free, "--output_dir", "x", "--preprocessing_num_workers", "2").fingerprint() == (
        before
    )
    for flag, value in {"max_length": 9, "template": "plain", "warmup_ratio": 0.5}.items():
        assert parsed(f"--{flag}", str(value)).fingerprint() != before


def test_accumulation_leaves_the_batch_alone() -> None:
    """Unlike the DreamBooth script, this one has Transformers' default of 8 rows."""
    cfg = parsed("--gradient_accumulation_steps", "4")
    assert (cfg.train_batch_size, cfg.gradient_accumulation_steps) == (8, 4)
