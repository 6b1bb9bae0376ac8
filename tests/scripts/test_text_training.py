"""Whole text runs: a small T5 learns by heart, evaluation disturbs nothing, records are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bilora_diffusion.run import runlog
from tests.scripts.runs import column
from tests.text.text_builders import (
    KINDS,
    NUMBERS,
    SAVERS,
    WORDS,
    rows_for,
    save_llama,
    save_t5,
    text_difference,
    train_text,
    write_rows,
)


def material(folder: Path, kind: str) -> dict[str, Any]:
    return {
        "model_name_or_path": SAVERS[kind](folder / "base"),
        "train_file": write_rows(folder / "rows.jsonl", rows_for(kind, 24)),
        "template": "plain",
        "train_batch_size": 4,
    }


@pytest.mark.slow
def test_a_small_t5_learns_64_answers_by_heart(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"{WORDS[n % 16]} {WORDS[n // 16]}",
            "answer": f"{NUMBERS[n % 5]} {WORDS[n % 7]}",
        }
        for n in range(64)
    ]
    assert len({row["prompt"] for row in rows}) == 64
    file = write_rows(tmp_path / "rows.jsonl", rows)
    folder = train_text(
        tmp_path / "run",
        model_name_or_path=save_t5(tmp_path / "t5", d_model=64, d_ff=128, d_kv=16),
        train_file=file,
        validation_file=file,
        max_train_steps=400,
        train_batch_size=32,
        rank=32,
        learning_rate=3e-3,
        max_target_length=8,
        eval_on_start=True,
    )
    assert column(folder, "heldout_exact_match") == [0.0, 1.0]
    assert column(folder, "heldout_loss")[-1] < 0.05
    answers = (folder / "validation" / "step-400" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in answers] == [row["answer"] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_disturb_training(tmp_path: Path, kind: str) -> None:
    given = {**material(tmp_path, kind), "max_train_steps": 4, "rho": 0.5}
    held = write_rows(tmp_path / "held.jsonl", rows_for(kind, 5, first=24))
    quiet = train_text(tmp_path / "quiet", **given)
    looked = train_text(
        tmp_path / "looked",
        **given,
        validation_file=held,
        validation_loss_steps=2,
        validation_epochs=1,
        eval_on_start=True,
        generation_max_new_tokens=4,
        max_predictions=3,
    )
    assert text_difference(quiet, looked) == 0
    rows = runlog.read_metrics(looked)
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 2, 4]
    answers = sorted(path.parent.name for path in looked.rglob("predictions.jsonl"))
    metric = {"classification": "heldout_accuracy"}.get(kind, "heldout_exact_match")
    measured = [row["step"] for row in rows if metric in row]
    if kind == "classification":
        assert (answers, measured) == ([], [0, 2, 4])
    else:  # an epoch is 6 steps
        assert (answers, measured) == (["step-0", "step-4"], [0, 4])
    results = runlog.read_run(looked)["results"]
    assert results["heldout_loss"] == column(looked, "heldout_loss")[-1]
    assert results[metric] == column(looked, metric)[-1]
    assert not (quiet / "validation").exists()


def test_epochs_and_warm_up_count_steps(tmp_path: Path) -> None:
    given = {**material(tmp_path, "causal"), "max_train_steps": None}
    folder = train_text(tmp_path / "run", **given, num_train_epochs=2, warmup_ratio=0.25)
    assert [row["step"] for row in runlog.read_metrics(folder)] == list(range(1, 13))
    rates = column(folder, "lr")
    assert rates[:4] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_packing_trains_on_fewer_longer_rows(tmp_path: Path) -> None:
    given = {**material(tmp_path, "causal"), "max_train_steps": None, "num_train_epochs": 1}
    given["max_length"] = 128
    single = train_text(tmp_path / "single", **given)
    packed = train_text(tmp_path / "packed", **given, packing=True)
    assert 0 < len(column(packed, "loss")) < len(column(single, "loss"))


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    given = material(tmp_path, "causal")
    given["model_name_or_path"] = save_llama(tmp_path / "chat", chat=True)
    given["template"] = None
    file = write_rows(tmp_path / "held.jsonl", rows_for("causal", 3, first=24))
    auto = train_text(tmp_path / "auto", **given, validation_file=file, max_length=80)
    assert len(list(auto.rglob("predictions.jsonl"))) == 1
    chat = train_text(tmp_path / "chosen", **{**given, "template": "chat"}, max_length=80)
    plain = train_text(tmp_path / "plain", **{**given, "template": "plain"}, max_length=80)
    assert column(auto, "loss") == column(chat, "loss")
    assert column(auto, "digest") != column(plain, "digest")


@pytest.mark.parametrize("method", ["bilora", "lora-sam"])
def test_dynamics_are_recorded(tmp_path: Path, method: str) -> None:
    given = {**material(tmp_path, "causal"), "method": method, "log_dynamics": True}
    folder = train_text(tmp_path / "run", **given, dynamics_steps=1)
    assert len(list(folder.rglob("*.safetensors"))) == 1 + 3  # the adapter, and steps 0, 1 and 2
    key = {"bilora": "ascent_gain", "lora-sam": "norm_BeA"}[method]
    recorded = [row[key] for row in column(folder, "dynamics") if key in row]
    assert len(recorded) == 2
    assert all(value is not None for value in recorded)


def test_the_average_is_exported_and_both_are_kept(tmp_path: Path) -> None:
    given = {**material(tmp_path, "causal"), "max_train_steps": 4, "checkpointing_steps": 4}
    plain = train_text(tmp_path / "plain", **given)
    averaged = train_text(tmp_path / "averaged", **given, use_ema=True, ema_decay=0.5)
    assert column(plain, "loss") == column(averaged, "loss")
    assert text_difference(plain, averaged) > 0
    kept = load_file(averaged / "checkpoints" / "step-4" / "adapters.safetensors")
    assert any(key.startswith("average/") for key in kept)


def test_trackers_get_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    held = write_rows(tmp_path / "held.jsonl", rows_for("classification", 5, first=24))
    folder = train_text(
        tmp_path / "run",
        **material(tmp_path, "classification"),
        validation_file=held,
        report_to="tensorboard",
    )
    assert list((folder / "logs").rglob("events.*"))
