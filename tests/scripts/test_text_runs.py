"""Whole text runs: they learn, resume exactly, export the primary alone, and record what they saw.

Methods and options of the adapters are the contract's; here each kind of model has its run.
"""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer, BertForMaskedLM

from bilora_diffusion.export.__main__ import main as export_step
from bilora_diffusion.run import runlog
from bilora_diffusion.text.models import load_text_model
from tests.scripts.runs import alike, column, copied, difference, weights
from tests.text import text_builders as texts

TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
TASK_TYPES["headless"] = TASK_TYPES["classification"]
LIVES: list[tuple[str, str, dict[str, Any]]] = [
    ("causal", "bilora", {"packing": True, "mixed_precision": "bf16"}),
    ("classification", "full", {}),
]
SLOW_LIVES: list[tuple[str, str, dict[str, Any]]] = [
    ("seq2seq", "bilora", {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}),
    ("causal", "lora-sam", {"use_ema": True, "ema_decay": 0.5, "gradient_checkpointing": True}),
    ("classification", "bilora", {"init_lora_weights": "pissa", "use_dora": True}),
    # Its pooler is random: the next loader would sample it anew.
    ("headless", "bilora", {"auxiliaries": "sample"}),
]


@pytest.fixture(scope="module")
def flags_by_kind(tmp_path_factory):
    """Flags of a run, with a rho so large that an auxiliary that acts in an evaluation is seen."""
    shared = {"max_predictions": 0, "checkpointing_steps": 1, "rho": 0.5}
    flags = {
        kind: {**texts.material(kind), "validation_file": texts.heldout(kind), **shared}
        for kind in texts.KINDS
    }
    bare = texts.save_bert(tmp_path_factory.mktemp("bare") / "bert", BertForMaskedLM)
    return {**flags, "headless": {**flags["classification"], "model_name_or_path": bare}}


@pytest.mark.parametrize(
    ("kind", "method", "values"),
    [
        *LIVES,
        *(pytest.param(*life, marks=pytest.mark.slow) for life in SLOW_LIVES),
    ],
)
def test_a_run_resumes_exactly_and_its_file_is_what_was_measured(
    flags_by_kind, tmp_path, kind, method, values
):
    flags = {**flags_by_kind[kind], "method": method, **values}
    folder = texts.train_text(tmp_path / "run", **flags)
    parts = copied(folder, tmp_path / "parts")
    texts.train_text(parts, **flags, resume_from_checkpoint="step-1")
    alike(folder, parts, "grad_norm", "heldout_loss")
    record = runlog.read_run(folder)
    assert record["status"] == "finished"
    # As PEFT or Transformers load it.
    measured = texts.heldout_of(flags["model_name_or_path"], folder)
    stored = {key: value for key, value in record["results"].items() if key in measured}
    assert stored == pytest.approx(measured, abs=1e-6)
    start, end = column(folder, "heldout_loss")
    assert abs(start - end) > 1e-4  # else the comparison above proves nothing
    if method == "full":
        assert not (folder / "adapter_model.safetensors").exists()
        base, model = flags["model_name_or_path"], folder / "model"
        words = [AutoTokenizer.from_pretrained(p)("hello there").input_ids for p in (base, model)]
        assert words[0] == words[1]
        assert 'subfolder="model"' in (folder / "README.md").read_text()
    else:
        is_an_adapter_of_the_primary(folder, kind, flags)
        for _ in range(2):  # the second time it is there already
            assert export_step([str(folder), "--step", "2"]) == 0
        assert export_step([str(folder), "--step", "1", "--to", "kohya"]) == 2
        assert difference(folder / "exports" / "step-2", folder) == 0
        report = record["results"]["export"]
        assert report["readback_difference"] == 0.0
        if TASK_TYPES[kind] == "SEQ_CLS":
            base, labels = str(flags["model_name_or_path"]), ("negative", "positive")
            initial = load_text_model(base, labels=labels).model.classifier.weight
            trained = weights(folder)["base_model.model.classifier.weight"]
            assert (initial - trained).abs().max() > 1e-3
        assert report["parameters"] == sum(value.numel() for value in weights(folder).values())


def is_an_adapter_of_the_primary(folder, kind, flags):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(flags["model_name_or_path"])
    assert (config["task_type"], config["peft_type"]) == (TASK_TYPES[kind], "LORA")
    assert config["inference_mode"] is True
    if "init_lora_weights" not in flags:  # whose files hold the difference from the first values
        assert (config["r"], config["lora_alpha"]) == (4, 8)
    new = {"classification": ["classifier"], "headless": ["bert.pooler.dense", "classifier"]}
    assert bool(config["modules_to_save"]) == (kind in new)
    keys = weights(folder).keys()
    whole_modules = {key.rpartition(".")[0] for key in keys if "lora_" not in key}
    assert sorted(whole_modules) == [f"base_model.model.{name}" for name in new.get(kind, [])]
    assert not [key for key in keys if "auxiliary" in key or "initial" in key]


def test_the_cut_and_checkpointing_change_nothing(flags_by_kind, tmp_path):
    flags = {**flags_by_kind["seq2seq"], "train_batch_size": 8, "learning_rate": 1e-4}
    one_pass = texts.train_text(tmp_path / "one_pass", **flags)
    cut = {"train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
    pieces = texts.train_text(tmp_path / "pieces", **{**flags, **cut})
    assert column(pieces, "loss") == pytest.approx(column(one_pass, "loss"), abs=1e-6)
    assert column(pieces, "grad_norm") == pytest.approx(column(one_pass, "grad_norm"), rel=1e-5)
    assert column(pieces, "digest") == column(one_pass, "digest")


@pytest.mark.parametrize("kind", ["causal", pytest.param("classification", marks=pytest.mark.slow)])
def test_evaluation_does_not_disturb_training(flags_by_kind, tmp_path, kind, capfd):
    flags = {**flags_by_kind[kind], "max_train_steps": 4}
    quiet = texts.train_text(tmp_path / "quiet", **{**flags, "validation_file": None})
    evaluation = {"validation_loss_steps": 2, "validation_epochs": 1, "eval_on_start": True}
    evaluation |= {"generation_max_new_tokens": 4, "max_predictions": 3}
    looked = texts.train_text(tmp_path / "looked", **{**flags, **evaluation})
    assert difference(quiet, looked) == 0
    rows = runlog.read_metrics(looked)
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 2, 4]
    answers = sorted(path.parent.name for path in looked.rglob("predictions.jsonl"))
    classified = kind == "classification"
    metric = "heldout_accuracy" if classified else "heldout_exact_match"
    measured = [row["step"] for row in rows if metric in row]
    # an epoch is 6 steps
    expected = ([], [0, 2, 4]) if classified else (["step-0", "step-4"], [0, 4])
    assert (answers, measured) == expected
    results = runlog.read_run(looked)["results"]
    for name in ("heldout_loss", metric):
        assert results[name] == column(looked, name)[-1]
    assert not (quiet / "validation").exists()
    assert "Map" not in capfd.readouterr().err  # progress of the tokenization


def test_epochs_and_warm_up_count_steps_and_packing_makes_fewer(flags_by_kind, tmp_path):
    flags = {**flags_by_kind["causal"], "max_train_steps": None, "num_train_epochs": 2}
    flags["train_batch_size"] = 8
    folder = texts.train_text(tmp_path / "run", **flags, warmup_ratio=0.25)
    assert [row["step"] for row in runlog.read_metrics(folder) if "lr" in row] == list(range(1, 7))
    rates = column(folder, "lr")
    assert rates[:3] == pytest.approx([0, 5e-3, 1e-2])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    packed = texts.train_text(tmp_path / "packed", **flags, packing=True, max_length=128)
    assert 0 < len(column(packed, "loss")) < 6


@pytest.mark.slow
def test_a_small_t5_learns_64_answers_by_heart(tmp_path):
    words, numbers = texts.WORDS, texts.NUMBERS
    prompts = [f"{words[n % 16]} {words[n // 16]}" for n in range(64)]
    answers = [f"{numbers[n % 5]} {words[n % 7]}" for n in range(64)]
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    file = texts.write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"train_file": file, "validation_file": file, "max_train_steps": 400, "rank": 32}
    flags |= {"train_batch_size": 32, "learning_rate": 3e-3, "eval_on_start": True}
    flags |= {"max_target_length": 8}
    base = texts.save_t5(tmp_path / "t5", d_model=64, d_ff=128, d_kv=16)
    folder = texts.train_text(tmp_path / "run", model_name_or_path=base, **flags)
    assert column(folder, "heldout_exact_match") == [0.0, 1.0]
    assert column(folder, "heldout_loss")[-1] < 0.05
    lines = (folder / "validation" / "step-400" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == answers


@pytest.mark.parametrize(("steps", "is_lora"), [(1, True), (2, False)])
def test_a_run_whose_auxiliary_was_always_zero_says_so(
    flags_by_kind, tmp_path, caplog, steps, is_lora
):
    warm_up = {"warmup_ratio": None, "lr_warmup_steps": 1}  # its only step has rate 0
    flags = {**flags_by_kind["seq2seq"], **warm_up, "max_train_steps": steps}
    texts.train_text(tmp_path / "run", **flags)
    assert ("plain LoRA" in caplog.text) == is_lora
