"""What a text run leaves: an adapter that PEFT loads on the base, or a model of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from bilora_diffusion.run import runlog
from bilora_diffusion.text import script as train_text
from bilora_diffusion.text.module import collate
from bilora_diffusion.train import running
from bilora_diffusion.train.task import inference
from bilora_diffusion.train.trainer import Trainer
from tests.text.text_builders import (
    KINDS,
    SAVERS,
    exported,
    loaded_run,
    rows_for,
    save_bert,
    text_flags,
    write_rows,
)

TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
Given = dict[str, Any]


def material(folder: Path, kind: str, **values: Any) -> Given:
    return {
        "model_name_or_path": SAVERS[kind](folder / "base"),
        "train_file": write_rows(folder / "rows.jsonl", rows_for(kind, 16)),
        "template": "plain",
        "train_batch_size": 4,
        "rho": 0.5,
        **values,
    }


def logits_of(module: Any, task: Any) -> torch.Tensor:
    """Of the first four training rows."""
    batch = collate([task.data.train.row(i) for i in range(4)], task.loaded.kind, 0)
    with inference(module):
        return module.logits(batch)


def trained(folder: Path, given: Given) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A run; its task, and its logits at the end: of the primary alone, and with all adapters."""
    seen: list[Any] = []

    def export(cfg: Any, trainer: Trainer, where: Path) -> dict[str, Any]:
        task = trainer.task
        with trainer.method.evaluating():
            seen.extend((task, logits_of(task.module, task)))
        seen.append(logits_of(task.module, task))
        return train_text.export(cfg, trainer, where)

    AcceleratorState._reset_state()
    script = dataclasses.replace(train_text.TEXT, export=export)
    running.main(script, text_flags(folder, **given))
    return seen[0], seen[1], seen[2]


@pytest.mark.parametrize(
    "values",
    [
        {"method": "bilora"},
        {"method": "bilora", "init_lora_weights": "pissa"},
        {"method": "bilora", "use_dora": True, "use_ema": True, "ema_decay": 0.5},
    ],
    ids=["default", "pissa", "dora-ema"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_trained_models_logits(tmp_path: Path, kind: str, values: Given) -> None:
    given = material(tmp_path, kind, **values)
    task, primary, both = trained(tmp_path / "run", given)
    labels = task.data.rows.label_words or None
    loaded = loaded_run(given["model_name_or_path"], tmp_path / "run", labels=labels)
    module = type(task.module)(loaded.model, kind)
    found = logits_of(module, task)
    torch.testing.assert_close(found, primary, atol=1e-6, rtol=1e-6)
    assert (found - both).abs().max() > 1e-4  # the auxiliary is there, and not in the file
    with loaded.model.disable_adapter():
        assert (logits_of(module, task) - primary).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_configuration(tmp_path: Path, kind: str) -> None:
    given = material(tmp_path, kind, rank=2, lora_alpha=6)
    trained(tmp_path / "run", given)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(given["model_name_or_path"])
    assert config["task_type"] == TASK_TYPES[kind]
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)
    assert config["inference_mode"] is True
    assert bool(config["modules_to_save"]) == (kind == "classification")
    keys = exported(tmp_path / "run").keys()
    assert keys
    assert not [key for key in keys if "auxiliary" in key]
    heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert {key for key in keys if "lora_" not in key} == (
        heads if kind == "classification" else set()
    )
    report = runlog.read_run(tmp_path / "run")["results"]["export"]
    assert report["readback_difference"] == 0.0
    assert report["parameters"] == sum(v.numel() for v in exported(tmp_path / "run").values())


def test_the_head_of_a_classifier_is_trained(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "bert")
    given = material(tmp_path, "classification", model_name_or_path=base)
    task, _, _ = trained(tmp_path / "run", given)
    from bilora_diffusion.text.models import load_text_model

    before = load_text_model(str(base), labels=task.data.rows.label_words).model.classifier.weight
    after = exported(tmp_path / "run")["base_model.model.classifier.weight"]
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["bilora", "flat-lora"])
def test_new_layers_below_the_head_are_in_the_file(tmp_path: Path, method: str) -> None:
    """A checkpoint without a pooler gets a random one, which the next loader would draw anew."""
    base = save_bert(tmp_path / "bert", BertForMaskedLM)
    given = material(tmp_path, "classification", model_name_or_path=base, method=method)
    task, primary, _ = trained(tmp_path / "run", given)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "run")).eval()
    found = logits_of(type(task.module)(loaded, "classification"), task)
    torch.testing.assert_close(found, primary, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_full_fine_tuning_leaves_a_model_that_loads(tmp_path: Path, kind: str) -> None:
    given = material(tmp_path, kind, method="full")
    task, primary, _ = trained(tmp_path / "run", given)
    folder = tmp_path / "run" / "model"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    loaded = loaded_run(given["model_name_or_path"], tmp_path / "run")
    module = type(task.module)(loaded.model, kind)
    torch.testing.assert_close(logits_of(module, task), primary, atol=1e-6, rtol=1e-6)
    assert AutoTokenizer.from_pretrained(folder)("hello there").input_ids == (
        task.loaded.tokenizer("hello there").input_ids
    )
    if kind == "seq2seq":
        assert AutoModelForSeq2SeqLM.from_pretrained(folder)
    if kind == "classification":
        assert loaded.model.config.id2label == {0: "negative", 1: "positive"}
    text = (tmp_path / "run" / "README.md").read_text()
    assert 'subfolder="model"' in text
