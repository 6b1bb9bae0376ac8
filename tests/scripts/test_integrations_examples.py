"""The scripts in examples/, as a person would start them, on small models and data on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.integrations.trainers import tiny_llm, tiny_t5, tiny_tokenizer
from tests.scripts.conftest import ROOT

SENTENCE = "w3 w4 w5 w6 w7"


def save(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write(file: Path, row: dict[str, str], count: int = 24) -> str:
    lines = [
        json.dumps({key: f"w{3 + number} {value}" for key, value in row.items()})
        for number in range(count)
    ]
    file.write_text("\n".join(lines))
    return str(file)


def start(name: str, *argv: str) -> subprocess.CompletedProcess[str]:
    always = ("--use_cpu", "True", "--report_to", "none", "--per_device_train_batch_size", "2")
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *argv, *always],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=840,
    )


@pytest.mark.slow
def test_trainer_stopped_and_resumed(tmp_path: Path) -> None:
    model = save(tmp_path / "model", tiny_llm())
    data = write(tmp_path / "data.jsonl", {"text": SENTENCE})
    common = ("--model", model, "--data", data, "--max_steps", "6", "--learning_rate", "1e-2")
    for folder in ("whole", "cut"):
        saves = ("--save_steps", "3", "--output_dir", str(tmp_path / folder))
        done = start("trainer_bilora.py", *common, *saves)
        assert done.returncode == 0, done.stderr
        assert "the auxiliary ended at 0.0500" in done.stdout
    final = tmp_path / "cut" / "adapter_model.safetensors"
    final.unlink()
    resume = ("--resume_from_checkpoint", str(tmp_path / "cut" / "checkpoint-3"))
    done = start("trainer_bilora.py", *common, "--output_dir", str(tmp_path / "cut"), *resume)
    assert done.returncode == 0, done.stderr
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    again = load_file(final)
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert PeftModel.from_pretrained(tiny_llm(), str(tmp_path / "cut"))

    other = (*common, "--rho", "0.3", "--output_dir", str(tmp_path / "cut"), *resume)
    refused = start("trainer_bilora.py", *other)
    assert refused.returncode == 2
    assert "rho was 0.05 and is 0.3" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_seq2seq(tmp_path: Path) -> None:
    model = save(tmp_path / "model", tiny_t5())
    data = write(tmp_path / "data.jsonl", {"input": SENTENCE, "target": "w9 w10"})
    done = start(
        "seq2seq_bilora.py",
        *("--model", model, "--data", data, "--output_dir", str(tmp_path / "run")),
        *("--held_out", "4", "--max_steps", "4", "--learning_rate", "1e-2"),
        *("--predict_with_generate", "True", "--generation_max_length", "6"),
    )
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 4
    assert PeftModel.from_pretrained(tiny_t5(), str(tmp_path / "run"))


@pytest.mark.slow
def test_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model = save(tmp_path / "model", tiny_llm())
    data = write(tmp_path / "data.jsonl", {"prompt": SENTENCE, "completion": "w9 w10"})
    done = start(
        "sft_bilora.py",
        *("--model", model, "--data", data, "--output_dir", str(tmp_path / "run")),
        *("--max_steps", "4", "--learning_rate", "1e-2"),
    )
    assert done.returncode == 0, done.stderr
    assert PeftModel.from_pretrained(tiny_llm(), str(tmp_path / "run"))
