"""The scripts in examples/, as a person would start them, on small models and data on the disk."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from tests.integrations.trainers import tiny_llm, tiny_t5, tiny_tokenizer
from tests.scripts.runs import ROOT, TORCHRUN, process

pytestmark = pytest.mark.slow

TRAINER = "trainer_bilora.py"
TEXT = {"text": "w3 w4 w5 w6 w7"}


def given(folder: Path, model: Any, columns: dict[str, str]) -> dict[str, Any]:
    """Flags for a model and 24 rows."""
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(folder / "model")
    rows = [{key: f"w{3 + n} {value}" for key, value in columns.items()} for n in range(24)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model": folder / "model", "data": folder / "data.jsonl"}


def start(
    name: str, values: dict[str, Any], launcher: tuple[object, ...] = ()
) -> subprocess.CompletedProcess[str]:
    always = {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
    words = [word for key, value in {**always, **values}.items() for word in (f"--{key}", value)]
    return process(*launcher, ROOT / "examples" / name, *words)


def test_trainer_stopped_and_resumed(tmp_path: Path) -> None:
    common = {**given(tmp_path, tiny_llm(), TEXT), "max_steps": 6, "learning_rate": 1e-2}
    cut = tmp_path / "cut"
    for folder in (tmp_path / "whole", cut):
        done = start(TRAINER, {**common, "save_steps": 3, "output_dir": folder})
        assert done.returncode == 0, done.stderr
        assert "the auxiliary ended at 0.0500" in done.stdout
    final = cut / "adapter_model.safetensors"
    final.unlink()
    again = {**common, "output_dir": cut, "resume_from_checkpoint": cut / "checkpoint-3"}
    done = start(TRAINER, again)
    assert done.returncode == 0, done.stderr
    resumed = load_file(final)
    for key, value in load_file(tmp_path / "whole" / final.name).items():
        assert torch.equal(resumed[key], value)
    assert PeftModel.from_pretrained(tiny_llm(), str(cut))

    refused = start(TRAINER, {**again, "rho": 0.3})
    assert refused.returncode == 2
    assert "rho was 0.05 and is 0.3" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["seq2seq_bilora.py", "sft_bilora.py"])
def test_the_others_leave_an_adapter(name: str, tmp_path: Path) -> None:
    run, answer = tmp_path / "run", "w9 w10"
    values = {"output_dir": run, "max_steps": 4, "learning_rate": 1e-2}
    if seq2seq := name.startswith("seq2seq"):
        model, columns = tiny_t5(), {"input": TEXT["text"], "target": answer}
        values |= {"held_out": 4, "predict_with_generate": True, "generation_max_length": 6}
    else:
        pytest.importorskip("trl")
        model, columns = tiny_llm(), {"prompt": TEXT["text"], "completion": answer}
    done = start(name, {**given(tmp_path, model, columns), **values})
    assert done.returncode == 0, done.stderr
    assert PeftModel.from_pretrained(model, str(run))
    if seq2seq:
        assert "held-out loss" in done.stdout
        assert len((run / "predictions.jsonl").read_text().splitlines()) == 4


@pytest.mark.timeout(1800)
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    common = {
        **given(tmp_path, tiny_llm(), TEXT),
        **{"max_steps": 4, "save_steps": 2, "train_sampling_strategy": "sequential"},
        # not AdamW, which amplifies rounding where gradients are small
        **{"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.1},
    }

    def last(folder: str, processes: int, **more: Any) -> dict[str, Tensor]:
        """What the last checkpoint holds."""
        own = {"per_device_train_batch_size": 4 // processes, "output_dir": tmp_path / folder}
        done = start(TRAINER, {**common, **own, **more}, (*TORCHRUN, processes))
        assert done.returncode == 0, done.stderr
        files = ("adapter_model.safetensors", "bilora_state.safetensors")
        held = [load_file(tmp_path / folder / "checkpoint-4" / name) for name in files]
        return {f"{n}/{key}": value for n, own in enumerate(held) for key, value in own.items()}

    one, two = last("one", 1), last("two", 2)
    again = last("two", 2, resume_from_checkpoint=tmp_path / "two" / "checkpoint-2")
    for key, value in one.items():
        assert (two[key] - value).abs().max() < 1e-5, key
        assert torch.equal(again[key], two[key]), key
    for adapter in (PRIMARY, AUXILIARY):
        ends = [v for key, v in two.items() if key[0] == "1" and adapter in key and "lora_B" in key]
        assert max(value.abs().max().item() for value in ends) > 1e-4, adapter
