"""Whole text runs: they learn, resume exactly, export the primary alone, and record what they saw.

Every pair of a method and an option of the adapters is the contract's; here each appears once.
"""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer, BertForMaskedLM

from bilora_diffusion.export.cli import main as export_step
from bilora_diffusion.methods import names
from bilora_diffusion.run import runlog
from bilora_diffusion.text.models import load_text_model
from tests.scripts.runs import alike, column, copied, difference, weights
from tests.text import text_builders as texts

Given = dict[str, Any]
TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
TASK_TYPES["headless"] = TASK_TYPES["classification"]
LIVES: list[tuple[str, str, Given]] = [
    ("causal", "bilora", {"packing": True, "mixed_precision": "bf16"}),
    ("seq2seq", "bilora", {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}),
    ("classification", "full", {}),
]
SLOW_LIVES: list[tuple[str, str, Given]] = [
    ("causal", "bilora", {"rho": "auto", "loss_rise": 0.2}),
    ("seq2seq", "bilora", {"auxiliaries": "sample"}),
    ("causal", "lora-sam", {"use_ema": True, "ema_decay": 0.5}),
    ("classification", "bilora", {"init_lora_weights": "pissa", "use_dora": True}),
    ("headless", "bilora", {}),  # its pooler is random: the next loader would draw it anew
]
MATRIX: list[tuple[str, str, Given]] = [
    ("seq2seq", "lora", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    ("classification", "flat-lora", {"mixed_precision": "bf16"}),
    ("causal", "lora-obar", {"use_dora": True, "lora_dropout": 0.1}),
    ("seq2seq", "lora-nbar", {"group_by_length": True}),
    ("causal", "full", {"mixed_precision": "bf16"}),
    ("headless", "flat-lora", {}),
    *(("causal", name, {}) for name in names()),
]


@pytest.fixture(scope="module")
def given_by_kind(tmp_path_factory):
    """Flags of a run, with a rho so large that an auxiliary that acts in an evaluation is seen."""
    own = {"max_predictions": 0, "checkpointing_steps": 1, "rho": 0.5}
    given = {
        kind: {**texts.material(kind), "validation_file": texts.heldout(kind), **own}
        for kind in texts.KINDS
    }
    bare = texts.save_bert(tmp_path_factory.mktemp("bare") / "bert", BertForMaskedLM)
    return {**given, "headless": {**given["classification"], "model_name_or_path": bare}}


@pytest.mark.parametrize(
    ("kind", "method", "values"),
    [
        *LIVES,
        *(pytest.param(*life, marks=pytest.mark.slow) for life in SLOW_LIVES),
        *(pytest.param(*life, marks=pytest.mark.matrix) for life in MATRIX),
    ],
)
def test_a_run_resumes_exactly_and_its_file_is_what_was_measured(
    given_by_kind, tmp_path, kind, method, values
):
    given = {**given_by_kind[kind], "method": method, **values}
    folder = texts.train_text(tmp_path / "run", **given)
    parts = copied(folder, tmp_path / "parts")
    texts.train_text(parts, **given, resume_from_checkpoint="step-1")
    alike(folder, parts, "grad_norm", "heldout_loss")
    record = runlog.read_run(folder)
    assert record["status"] == "finished"
    # As PEFT or Transformers load it.
    measured = texts.heldout_of(given["model_name_or_path"], folder)
    stored = {key: value for key, value in record["results"].items() if key in measured}
    assert stored == pytest.approx(measured, abs=1e-6)
    start, end = column(folder, "heldout_loss")
    assert abs(start - end) > 1e-4  # else the comparison above proves nothing
    if method == "full":
        assert not (folder / "adapter_model.safetensors").exists()
        base, model = given["model_name_or_path"], folder / "model"
        words = [AutoTokenizer.from_pretrained(p)("hello there").input_ids for p in (base, model)]
        assert words[0] == words[1]
        assert 'subfolder="model"' in (folder / "README.md").read_text()
    else:
        is_an_adapter_of_the_primary(folder, kind, given)
        assert export_step([str(folder), "--step", "2"]) == 0
        assert export_step([str(folder), "--step", "1", "--to", "kohya"]) == 2
        assert difference(folder / "exports" / "step-2", folder) == 0
        report = record["results"]["export"]
        assert report["readback_difference"] == 0.0
        if TASK_TYPES[kind] == "SEQ_CLS":
            base, labels = str(given["model_name_or_path"]), ("negative", "positive")
            drawn = load_text_model(base, labels=labels).model.classifier.weight
            trained = weights(folder)["base_model.model.classifier.weight"]
            assert (drawn - trained).abs().max() > 1e-3
        assert report["parameters"] == sum(value.numel() for value in weights(folder).values())


def is_an_adapter_of_the_primary(folder, kind, given):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(given["model_name_or_path"])
    assert (config["task_type"], config["peft_type"]) == (TASK_TYPES[kind], "LORA")
    assert config["inference_mode"] is True
    if "init_lora_weights" not in given:  # whose files hold the difference from the first values
        assert (config["r"], config["lora_alpha"]) == (4, 8)
    new = {"classification": ["classifier"], "headless": ["bert.pooler.dense", "classifier"]}
    assert bool(config["modules_to_save"]) == (kind in new)
    keys = weights(folder).keys()
    whole = {key.rpartition(".")[0] for key in keys if "lora_" not in key}
    assert sorted(whole) == [f"base_model.model.{name}" for name in new.get(kind, [])]
    assert not [key for key in keys if "auxiliary" in key or "initial" in key]


def test_the_cut_checkpointing_the_method_and_four_bits_change_nothing_that_is_seen(
    given_by_kind, tmp_path
):
    given = {**given_by_kind["seq2seq"], "train_batch_size": 8, "learning_rate": 1e-4}
    whole = texts.train_text(tmp_path / "whole", **given)
    cut = {"train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
    pieces = texts.train_text(tmp_path / "pieces", **{**given, **cut})
    assert column(pieces, "loss") == pytest.approx(column(whole, "loss"), abs=1e-6)
    assert column(pieces, "grad_norm") == pytest.approx(column(whole, "grad_norm"), rel=1e-5)
    sam = texts.train_text(tmp_path / "sam", **given, method="lora-sam", quantize="nf4")
    assert column(sam, "loss")[0] == pytest.approx(column(whole, "loss")[0], rel=0.05)
    assert column(sam, "loss")[0] != column(whole, "loss")[0]  # since weights were rounded
    assert column(pieces, "digest") == column(whole, "digest") == column(sam, "digest")


@pytest.mark.parametrize("kind", ["causal", pytest.param("classification", marks=pytest.mark.slow)])
def test_evaluation_does_not_disturb_training(given_by_kind, tmp_path, kind, capfd):
    given = {**given_by_kind[kind], "max_train_steps": 4}
    quiet = texts.train_text(tmp_path / "quiet", **{**given, "validation_file": None})
    asked = {"validation_loss_steps": 2, "validation_epochs": 1, "eval_on_start": True}
    asked |= {"generation_max_new_tokens": 4, "max_predictions": 3}
    looked = texts.train_text(tmp_path / "looked", **{**given, **asked})
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


def test_epochs_and_warm_up_count_steps_and_packing_makes_fewer(given_by_kind, tmp_path):
    given = {**given_by_kind["causal"], "max_train_steps": None, "num_train_epochs": 2}
    given["train_batch_size"] = 8
    folder = texts.train_text(tmp_path / "run", **given, warmup_ratio=0.25)
    assert [row["step"] for row in runlog.read_metrics(folder) if "lr" in row] == list(range(1, 7))
    rates = column(folder, "lr")
    assert rates[:3] == pytest.approx([0, 5e-3, 1e-2])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    packed = texts.train_text(tmp_path / "packed", **given, packing=True, max_length=128)
    assert 0 < len(column(packed, "loss")) < 6


@pytest.mark.slow
def test_a_small_t5_learns_64_answers_by_heart(tmp_path):
    words, numbers = texts.WORDS, texts.NUMBERS
    prompts = [f"{words[n % 16]} {words[n // 16]}" for n in range(64)]
    answers = [f"{numbers[n % 5]} {words[n % 7]}" for n in range(64)]
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    file = texts.write_rows(tmp_path / "rows.jsonl", rows)
    given = {"train_file": file, "validation_file": file, "max_train_steps": 400, "rank": 32}
    given |= {"train_batch_size": 32, "learning_rate": 3e-3, "eval_on_start": True}
    given |= {"max_target_length": 8}
    base = texts.save_t5(tmp_path / "t5", d_model=64, d_ff=128, d_kv=16)
    folder = texts.train_text(tmp_path / "run", model_name_or_path=base, **given)
    assert column(folder, "heldout_exact_match") == [0.0, 1.0]
    assert column(folder, "heldout_loss")[-1] < 0.05
    lines = (folder / "validation" / "step-400" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == answers


@pytest.mark.parametrize("auxiliaries", [1, "sample"])
def test_a_radius_that_sets_itself_acts_under_the_scripts_own_warm_up(
    given_by_kind, tmp_path, auxiliaries
):
    own_schedule = {"warmup_ratio": None, "learning_rate": None, "max_train_steps": 4}
    given = {**given_by_kind["seq2seq"], **own_schedule, "rho": "auto", "auxiliaries": auxiliaries}
    folder = texts.train_text(tmp_path / "run", **given)
    assert column(folder, "lr")[0] == 0
    assert column(folder, "auxiliary_norm")[0] == 0
    assert max(column(folder, "auxiliary_norm")) > 0


@pytest.mark.parametrize(("steps", "is_lora"), [(1, True), (2, False)])
def test_a_run_whose_auxiliary_was_always_zero_says_so(
    given_by_kind, tmp_path, caplog, steps, is_lora
):
    warm_up = {"warmup_ratio": None, "lr_warmup_steps": 1}  # its only step has rate 0
    given = {**given_by_kind["seq2seq"], **warm_up, "max_train_steps": steps}
    texts.train_text(tmp_path / "run", **given)
    assert ("plain LoRA" in caplog.text) == is_lora
