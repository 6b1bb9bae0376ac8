"""What is told of a command line before it runs: what has no effect, and defaults that surprise."""

from __future__ import annotations

import pytest

from bilora_diffusion.config import DreamBoothConfig, parse

MINI = ["--dataset", "mini"]
PRODIGY = [*MINI, "--optimizer", "prodigy"]
HUB = ["--dataset", "a/b", "--instance_prompt", "x"]


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without a launcher, on which every optional package is installed."""
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for module in ("resolve", "environment"):
        monkeypatch.setattr(f"bilora_diffusion.config.{module}.device_type", lambda: "cpu")
    monkeypatch.setattr("bilora_diffusion.config.environment.is_installed", lambda name: True)


def told(argv: list[str], caplog: pytest.LogCaptureFixture) -> tuple[DreamBoothConfig, list[str]]:
    """What a command line means, and the sentences that are said about it."""
    caplog.clear()
    cfg = parse(argv)
    messages = [record.getMessage() for record in caplog.records]
    for message in messages:
        assert "\n" not in message
        assert message.endswith(".")
    return cfg, messages


@pytest.mark.parametrize(
    ("argv", "idle", "parts"),
    [
        (MINI, ["--class_data_dir", "x"], ['--class_data_dir "x"', "--with_prior_preservation"]),
        (MINI, ["--class_prompt", "a dog"], ['"a dog"', "--with_prior_preservation"]),
        (MINI, ["--num_class_images", "5"], ["--num_class_images 5", "--with_prior"]),
        (MINI, ["--sample_batch_size", "5"], ["--sample_batch_size 5", "--with_prior"]),
        (MINI, ["--text_encoder_lr", "5e-6"], ["--text_encoder_lr 5e-06", "--train_text_encoder"]),
        (MINI, ["--prodigy_decouple", "False"], ["--prodigy_decouple False", "prodigy"]),
        (MINI, ["--lr_power", "2"], ["--lr_power 2.0", "polynomial"]),
        (MINI, ["--lr_num_cycles", "2"], ["--lr_num_cycles 2", "cosine_with_restarts"]),
        (MINI, ["--lr_warmup_steps", "10"], ["--lr_warmup_steps 10", "constant_with_warmup"]),
        (PRODIGY, ["--use_8bit_adam"], ["--use_8bit_adam", "--optimizer AdamW"]),
        (
            [*PRODIGY, "--train_text_encoder"],
            ["--text_encoder_lr", "5e-6"],
            ["--text_encoder_lr 5e-06", "--learning_rate"],
        ),
        (
            [*MINI, "--max_train_steps", "9"],
            ["--num_train_epochs", "2"],
            ["--num_train_epochs 2", "--max_train_steps"],
        ),
        (MINI, ["--snr_weighting", "diffusers"], ['"diffusers"', "--snr_gamma"]),
        (MINI, ["--hub_model_id", "me/x"], ['"me/x"', "--push_to_hub"]),
        (MINI, ["--hub_token", "hf_x"], ["--hub_token has no effect", "--push_to_hub"]),
        (MINI, ["--revision", "main"], ['--revision "main"', "local"]),
        (MINI, ["--dataset_config_name", "x"], ['--dataset_config_name "x"', "built-in"]),
        (MINI, ["--lora_ga_samples", "8"], ["--lora_ga_samples 8", "--init_lora_weights lora-ga"]),
        (MINI, ["--dynamics_steps", "8"], ["--dynamics_steps 8", "--log_dynamics"]),
        (
            [*MINI, "--validation_dataset", "none"],
            ["--validation_loss_steps", "5"],
            ["--validation_loss_steps 5", "--validation_dataset"],
        ),
        (HUB, ["--validation_epochs", "3"], ["--validation_epochs 3", "--validation_prompt"]),
        (HUB, ["--num_validation_images", "3"], ["3", "--validation_prompt"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_option_without_effect_is_told_and_set_aside(
    argv: list[str],
    idle: list[str],
    parts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line, and the run is that of the command line without it; diffusers accepts them too."""
    without, before = told(argv, caplog)
    cfg, messages = told([*argv, *idle], caplog)
    assert cfg == without
    (message,) = [message for message in messages if message not in before]
    for part in parts:
        assert part in message
    assert "hf_x" not in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--rank", "16"], ["--rank 16", "--lora_alpha 32", "--lora_alpha 16"]),
        (["--optimizer", "prodigy", "--learning_rate", "1e-4"], ["--learning_rate 0.0001", "1.0"]),
        (["--lr_scheduler", "constant_with_warmup"], ["--lr_warmup_steps"]),
        (["--rank", "16", "--lora_alpha", "16"], []),
        (["--optimizer", "prodigy"], []),
        ([], []),
    ],
)
def test_defaults_that_might_surprise_are_told_once(
    argv: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, messages = told([*MINI, *argv], caplog)
    assert len(messages) == bool(parts)
    for part in parts:
        assert part in messages[0]
    monkeypatch.setenv("RANK", "1")
    assert told([*MINI, *argv], caplog)[1] == []  # the main process alone speaks
