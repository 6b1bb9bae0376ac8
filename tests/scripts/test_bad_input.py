"""Bad input that a command finds after parsing: one sentence, exit code 2, no file changed.

tests/config/test_constraints.py tests errors in the command line itself. Errors in a set of images
or in a file of rows are tested next to their readers.
"""

import json
import math
import subprocess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dreambooth_bilora
import train_text_bilora
from bilora_diffusion.config import machine
from bilora_diffusion.run import checkpoint, runlog
from tests.scripts.runs import (
    ON_CPUS,
    ROOT,
    TORCHRUN,
    copied,
    error_sentence,
    file_contents,
    flags,
    started,
    train_once,
)
from tests.text import text_builders as texts

IMAGE = "image"
LLAMA = "causal"
BERT = "classification"
CASES: list[Any] = [
    (IMAGE, {"pretrained_model_name_or_path": "no/such-model"}, ("no/such-model",)),
    (IMAGE, {"pretrained_model_name_or_path": "{tmp}/unknown"}, ("Sigma", "FluxPipeline")),
    (LLAMA, {"train_file": "{tmp}/latin.jsonl"}, ("line 2", "UTF-8", "0xe9")),
    (LLAMA, {"target_modules": "to_q"}, ("to_q", "q_proj")),
    (BERT, {"validation_file": "{tmp}/other.jsonl"}, ('"neutral"', "line 2 of other.jsonl")),
    (BERT, {"model_name_or_path": "{tmp}/infinite"}, ("infinite", "not finite")),
]
"""Kind of run, wrong value or file, and words of the error message."""
DIVERGING_ON_ONE = """
import os, sys
import train_dreambooth_bilora
from bilora_diffusion.image.loss import DreamBoothModule

forward = DreamBoothModule.forward
calls = 0

def forward_with_infinity(self, inputs):
    global calls
    calls += 1
    losses = forward(self, inputs)
    if os.environ["RANK"] == "1" and calls == 3:
        losses = losses * float("inf")
    return losses

DreamBoothModule.forward = forward_with_infinity
sys.exit(train_dreambooth_bilora.main(sys.argv[1:]))
"""
DIVERGING = {"learning_rate": 1e4, "lora_alpha": 1e6, "max_train_steps": 6}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """Create models and files that have one error each."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "unknown").mkdir()
    (folder / "unknown" / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    texts.save_bert(folder / "infinite")
    weights = load_file(folder / "infinite" / "model.safetensors")
    weights["bert.pooler.dense.bias"].fill_(math.nan)
    save_file(weights, folder / "infinite" / "model.safetensors", metadata={"format": "pt"})
    good = json.dumps(texts.rows_for(LLAMA, 1)[0]) + "\n"
    (folder / "latin.jsonl").write_bytes((good + '{"prompt": "é"}\n').encode("latin-1"))
    answers = [{"prompt": "a", "answer": answer} for answer in ("positive", "neutral")]
    texts.write_rows(folder / "other.jsonl", answers)
    return folder


def refused(argv, capsys):
    """Run a script with a bad command line and return its error message."""
    is_text = "--model_name_or_path" in argv
    script = train_text_bilora if is_text else train_dreambooth_bilora
    exit_code = script.main(argv)
    assert exit_code == 2
    return error_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(("kind", "values", "words"), CASES)
def test_bad_input_gives_one_sentence_and_exit_code_2(
    kind, values, words, bad_folder, tmp_path, capsys
):
    values = {name: value.format(tmp=bad_folder) for name, value in values.items()}
    before = file_contents(bad_folder)
    if kind == IMAGE:
        argv = flags(tmp_path / "run", **{"pretrained_model_name_or_path": "mini", **values})
    else:
        argv = texts.text_flags(tmp_path / "run", **{**texts.material(kind), **values})
    sentence = refused(argv, capsys)
    for word in words:
        assert word in sentence
    assert file_contents(bad_folder) == before
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_only_the_same_run_is_resumed(tmp_path, capsys):
    run = copied(train_once(checkpointing_steps=1), tmp_path / "run")
    before = file_contents(run)
    refused(flags(run, resume_from_checkpoint="latest", method="lora"), capsys)
    assert file_contents(run) == before
    file = run / "checkpoints" / "step-2" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert file.name in refused(flags(run, resume_from_checkpoint="latest"), capsys)

    run = texts.train_text_once(LLAMA, checkpointing_steps=1)
    before = file_contents(run)
    options = {**texts.material(LLAMA), "resume_from_checkpoint": "latest", "max_train_samples": 4}
    assert "max_train_samples" in refused(texts.text_flags(run, **options), capsys)
    assert file_contents(run) == before


@pytest.mark.parametrize(
    ("kind", "step", "samples"), [(IMAGE, 2, ".png"), (LLAMA, 3, " of rows.jsonl")]
)
def test_a_nonfinite_loss_stops_the_run_and_names_the_samples(
    kind, step, samples, tmp_path, capsys
):
    folder = tmp_path / "run"
    values = {**DIVERGING, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    if kind == IMAGE:
        argv = flags(folder, **values, adam_weight_decay=1e4)
    else:
        values |= {**texts.material(kind), "train_batch_size": 1}
        argv = texts.text_flags(folder, **values, weight_decay=1e4)
    sentence = refused(argv, capsys)
    assert f"step {step} is not finite for " in sentence
    assert samples in sentence
    assert runlog.read_run(folder)["status"] == "failed"
    assert checkpoint.steps(folder)[-1] == step - 1


@pytest.mark.parametrize(
    "launch",
    [
        {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"},  # --cpu --num_processes 2
        {"LOCAL_RANK": "0", "WORLD_SIZE": "2"},  # torchrun
    ],
)
def test_processes_that_would_train_separately_are_refused(launch, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "device_type", lambda: "cpu")
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    sentence = refused(flags(tmp_path / "run"), capsys)
    assert "ACCELERATE_USE_CPU=true torchrun" in sentence
    assert "accelerate launch" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_infinite_loss_on_one_process_stops_all_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DIVERGING_ON_ONE)
    folder = tmp_path / "run"
    argv = flags(folder, max_train_steps=6, checkpointing_steps=1, gradient_accumulation_steps=1)
    environment = {**ON_CPUS, "PYTHONPATH": str(ROOT)}
    process = started(*TORCHRUN, 2, script, *argv, stderr=subprocess.PIPE, environment=environment)
    output = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "is not finite for" in output
    record = runlog.read_run(folder)
    assert record["status"] == "failed"
    saved_step = checkpoint.steps(folder)[-1]
    saved_folder = checkpoint.latest(folder)
    assert saved_folder is not None
    assert f"step {saved_step + 1} is not finite" in record["error"]
    for weight in checkpoint.load(saved_folder).tensors.values():
        assert torch.isfinite(weight).all()
