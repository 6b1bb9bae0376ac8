"""Messages before a run: options without effect, and surprising defaults."""

import pytest

from bilora_diffusion.image.config import resolve
from bilora_diffusion.text.config import resolve as resolve_text

MINI = "--dataset mini"
PRODIGY = f"{MINI} --optimizer prodigy"
HUB = "--dataset a/b --instance_prompt x"
TASK = "--model_name_or_path smollm2 --task sst2"


def resolved(words, caplog):
    """Return a command line's configuration and the messages about it."""
    caplog.clear()
    read = resolve_text if words.startswith("--model_name_or_path") else resolve
    cfg = read(words.split())
    messages = [record.getMessage() for record in caplog.records]
    for message in messages:
        assert message.endswith(".")
        assert "\n" not in message
    return cfg, messages


@pytest.mark.parametrize(
    ("words", "ignored", "fix"),
    [
        (MINI, "--class_data_dir x", "--with_prior_preservation"),
        (MINI, "--lr_warmup_steps 10", "constant_with_warmup"),
        (PRODIGY, "--use_8bit_adam", "--optimizer adamw"),
        (f"{PRODIGY} --train_text_encoder", "--text_encoder_lr 5e-06", "--learning_rate"),
        (f"{MINI} --max_train_steps 9", "--num_train_epochs 2", "--max_train_steps"),
        (f"{MINI} --validation_prompt x", "--final_validation_prompt y", "drop it"),
        (HUB, "--skip_final_inference", "--validation_prompt"),
        (HUB, "--sample_batch_size 1", "--validation_prompt"),
        (MINI, "--hub_token hf_x", "--push_to_hub"),
        (MINI, "--revision main", "hub id"),
        (f"{MINI} --validation_dataset none", "--validation_loss_steps 5", "--validation_dataset"),
        (f"{TASK} --lr_scheduler constant", "--warmup_ratio 0.1", "constant_with_warmup"),
    ],
)
def test_an_option_without_effect_is_named_and_ignored(words, ignored, fix, caplog):
    """There is one message, and the configuration equals that without the option."""
    cfg_without, messages_without = resolved(words, caplog)
    cfg, messages = resolved(f"{words} {ignored}", caplog)
    if TASK not in words:  # for text it replaces the default ratio
        assert cfg == cfg_without
    assert cfg.warmup_steps(100) == cfg_without.warmup_steps(100)
    (message,) = [message for message in messages if message not in messages_without]
    option = ignored.replace(" hf_x", "")  # secrets are not printed
    assert message.replace('"', "").startswith(f"{option} has no effect")
    assert fix in message
    assert "hf_x" not in message


def test_evaluation_options_without_held_out_rows_are_named_and_ignored(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "target": "b"}\n')
    words = f"--model_name_or_path smollm2 --train_file {tmp_path / 'rows.jsonl'}"
    ignored = "--eval_steps 5 --validation_epochs 1 --eval_on_start --eval_train_samples 3"
    cfg_without, _ = resolved(words, caplog)
    cfg, messages = resolved(f"{words} {ignored} --max_predictions 2", caplog)
    assert cfg == cfg_without
    assert len(messages) == 5


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (f"{MINI} --rank 16", "--lora_alpha 32"),
        (f"{PRODIGY} --learning_rate 1e-4", "--learning_rate 0.0001"),
        (f"{MINI} --learning_rate 1", "1e-4 to 1e-3"),
        (f"{MINI} --use_dora", "A1111"),
        (f"{MINI} --use_dora --no_output_kohya_format", None),
        (MINI, None),
    ],
)
def test_only_the_main_process_names_a_surprising_default(words, part, monkeypatch, caplog):
    _, messages = resolved(words, caplog)
    if part is None:
        assert messages == []
    else:
        (message,) = messages
        assert part in message
    monkeypatch.setenv("RANK", "1")
    assert resolved(words, caplog)[1] == []
