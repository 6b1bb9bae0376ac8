"""The scripts in examples/, as a person would start them, on small models and data on the disk."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.errors import UserError
from tests.integrations.trainers import tiny_llm, tiny_t5, tiny_tokenizer
from tests.scripts.runs import ROOT, TORCHRUN, process

pytestmark = pytest.mark.slow

TRAINER = "trainer_bilora"
TEXT = {"text": "w3 w4 w5 w6 w7"}


def given(folder: Path, model: Any, columns: dict[str, str]) -> dict[str, Any]:
    """Flags for a model and 24 rows."""
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(folder / "model")
    rows = [{key: f"w{3 + n} {value}" for key, value in columns.items()} for n in range(24)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model": folder / "model", "data": folder / "data.jsonl"}


def words(values: dict[str, Any]) -> list[str]:
    always = {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
    return [str(w) for key, value in {**always, **values}.items() for w in (f"--{key}", value)]


def start(name: str, values: dict[str, Any]) -> None:
    AcceleratorState._reset_state(True)
    importlib.import_module(f"examples.{name}").main(words(values))


def test_trainer_stopped_and_resumed(tmp_path, capsys):
    common = {**given(tmp_path, tiny_llm(), TEXT), "max_steps": 6, "learning_rate": 1e-2}
    cut = tmp_path / "cut"
    for folder in (tmp_path / "whole", cut):
        start(TRAINER, {**common, "save_steps": 3, "output_dir": folder})
        assert "the auxiliary ended at 0.0500" in capsys.readouterr().out
    final = cut / "adapter_model.safetensors"
    final.unlink()
    again = {**common, "output_dir": cut, "resume_from_checkpoint": cut / "checkpoint-3"}
    start(TRAINER, again)
    resumed = load_file(final)
    for key, value in load_file(tmp_path / "whole" / final.name).items():
        assert torch.equal(resumed[key], value)
    assert PeftModel.from_pretrained(tiny_llm(), str(cut))
    with pytest.raises(UserError, match="rho was"):
        start(TRAINER, {**again, "rho": 0.3})


@pytest.mark.parametrize("name", ["seq2seq_bilora", "sft_bilora"])
def test_the_others_leave_an_adapter(name, tmp_path, capsys):
    run, answer = tmp_path / "run", "w9 w10"
    values = {"output_dir": run, "max_steps": 4, "learning_rate": 1e-2}
    if seq2seq := name.startswith("seq2seq"):
        model, columns = tiny_t5(), {"input": TEXT["text"], "target": answer}
        values |= {"held_out": 4, "predict_with_generate": True, "generation_max_length": 6}
    else:
        pytest.importorskip("trl")
        model, columns = tiny_llm(), {"prompt": TEXT["text"], "completion": answer}
    start(name, {**given(tmp_path, model, columns), **values})
    assert PeftModel.from_pretrained(model, str(run))
    if seq2seq:
        assert "held-out loss" in capsys.readouterr().out
        assert len((run / "predictions.jsonl").read_text().splitlines()) == 4


def test_two_processes_take_the_steps_of_one(tmp_path):
    common = {
        **given(tmp_path, tiny_llm(), TEXT),
        **{"max_steps": 4, "save_steps": 4, "train_sampling_strategy": "sequential"},
        # not AdamW, which amplifies rounding where gradients are small
        **{"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.1},
    }

    def last(folder: str, processes: int) -> dict[str, Tensor]:
        """What the last checkpoint holds."""
        own = {"per_device_train_batch_size": 4 // processes, "output_dir": tmp_path / folder}
        if processes == 1:
            start(TRAINER, {**common, **own})
        else:
            script = ROOT / "examples" / f"{TRAINER}.py"
            done = process(*TORCHRUN, processes, script, *words({**common, **own}))
            assert done.returncode == 0, done.stderr
        files = ("adapter_model.safetensors", "bilora_state.safetensors")
        held = [load_file(tmp_path / folder / "checkpoint-4" / name) for name in files]
        return {f"{n}/{key}": value for n, own in enumerate(held) for key, value in own.items()}

    one, two = last("one", 1), last("two", 2)
    for key, value in one.items():
        assert (two[key] - value).abs().max() < 1e-5, key
    for adapter in (PRIMARY, AUXILIARY):
        ends = [v for key, v in two.items() if key[0] == "1" and adapter in key and "lora_B" in key]
        assert max(value.abs().max().item() for value in ends) > 1e-4, adapter
