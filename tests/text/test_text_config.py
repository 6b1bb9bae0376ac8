"""The text script's options: the tables' defaults, spellings of other scripts, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.adapters import ALL_LINEAR
from bilora_diffusion.config import TextConfig, parse_text
from bilora_diffusion.errors import UserError


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


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--max_length", "0"), "--max_length is 0"),
        (("--warmup_ratio", "1.5"), "--warmup_ratio is 1.5"),
        (("--warmup_ratio", "-0.1"), "--warmup_ratio is -0.1"),
        (("--packing", "--group_by_length"), "--group_by_length"),
        (("--packing", "--task_type", "seq2seq"), "--packing"),
        (("--packing", "--task_type", "classification"), "--packing"),
        (("--input_column", "text"), "--input_column"),
        (("--validation_file", "x.jsonl"), "--validation_file"),
        (("--train_file", "x.jsonl"), "only one"),
        (("--warmup_ratio", "0.1", "--lr_warmup_steps", "3"), "give only one"),
        (("--eval_batch_size", "0"), "--eval_batch_size is 0"),
        (("--max_predictions", "-1"), "--max_predictions is -1"),
        (("--generation_max_new_tokens", "0"), "--generation_max_new_tokens is 0"),
        (("--template", "chatml"), "chat, alpaca, plain"),
        (("--resolution", "64"), "unknown flag"),
        (("--quantize", "nf4", "--method", "full"), "4-bit"),
    ],
)
def test_refusals(argv: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--warmup_ratio", "0.1", "--lr_scheduler", "constant"), "constant_with_warmup"),
        (("--lr_warmup_steps", "3", "--lr_scheduler", "constant"), "constant_with_warmup"),
        (("--ema_decay", "0.5"), "--use_ema"),
        (("--dynamics_steps", "5"), "--log_dynamics"),
        (("--rank", "4"), "--lora_alpha 8"),
    ],
)
def test_what_has_no_effect_is_told(
    argv: tuple[str, ...], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = parsed(*argv)
    (record,) = caplog.records
    assert f"{argv[0]} {argv[1]}" in record.getMessage()
    assert named in record.getMessage()
    assert cfg.warmup_steps(100) == (0 if "constant" in argv else 3)


def test_an_evaluation_without_rows_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "target": "b"}\n')
    words = ["--model_name_or_path", "smollm2", "--train_file", str(tmp_path / "rows.jsonl")]
    idle = ["--eval_steps", "5", "--validation_epochs", "1", "--eval_on_start"]
    idle += ["--eval_train_samples", "3", "--max_predictions", "2"]
    assert parse_text([*words, *idle]) == parse_text(words)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 5
    assert all("--validation_file" in message for message in messages)


def test_accumulation_leaves_the_batch_alone() -> None:
    """Unlike the DreamBooth script, this one has Transformers' default of 8 rows."""
    cfg = parsed("--gradient_accumulation_steps", "4")
    assert (cfg.train_batch_size, cfg.gradient_accumulation_steps) == (8, 4)


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match='did you mean "sst2"'):
        parse_text(["--model_name_or_path", "smollm2", "--task", "sst-2"])


def test_model_and_text_are_needed() -> None:
    with pytest.raises(UserError, match="no model is given"):
        parse_text(["--task", "sst2"])
    with pytest.raises(UserError, match="no text is given"):
        parse_text(["--model_name_or_path", "smollm2"])
