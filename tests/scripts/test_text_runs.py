"""Complete text runs: they learn, resume exactly, export only the primary, and log their metrics.

tests/contract tests the methods and the options of adapters; this file runs each kind of model.
"""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer, BertForMaskedLM

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.export.__main__ import main as export_step
from bilora_diffusion.run import runlog
from bilora_diffusion.text.models import load_text_model
from bilora_diffusion.train import loop
from tests.scripts.runs import assert_same_run, column, copied, difference, weights
from tests.text.text_builders import (
    KINDS,
    NUMBERS,
    WORDS,
    heldout,
    heldout_of,
    material,
    save_bert,
    save_t5,
    train_text,
    write_rows,
)

TASK_TYPES = {
    "seq2seq": "SEQ_2_SEQ_LM",
    "causal": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "headless": "SEQ_CLS",
}
NEW_MODULES = {
    "classification": ["classifier"],
    "headless": ["bert.pooler.dense", "classifier"],
}
"""Modules without pretrained weights, which are trained and saved in full."""
CASES: list[Any] = [
    ("causal", "bilora", {"packing": True, "mixed_precision": "bf16"}),
    ("classification", "full", {}),
]
SLOW_CASES = [
    ("seq2seq", "bilora", {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}),
    ("causal", "lora-sam", {"gradient_checkpointing": True}),
    ("classification", "bilora", {"init_lora_weights": "pissa", "use_dora": True}),
    # Its pooler is random, so it must be saved: loading the base again gives other values.
    ("headless", "bilora", {}),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


@pytest.fixture(scope="module")
def flags_by_kind(tmp_path_factory):
    """Return flags of a run, by kind of model.

    rho is so large that an auxiliary left active in an evaluation would change its result.
    """
    shared = {"max_predictions": 0, "checkpointing_steps": 1, "rho": 0.5}
    flags = {}
    for kind in KINDS:
        flags[kind] = {**material(kind), "validation_file": heldout(kind), **shared}
    bare = save_bert(tmp_path_factory.mktemp("bare") / "bert", BertForMaskedLM)
    flags["headless"] = {**flags["classification"], "model_name_or_path": bare}
    return flags


@pytest.mark.parametrize(("kind", "method", "values"), CASES)
def test_a_run_resumes_exactly_and_its_file_has_the_measured_scores(
    flags_by_kind, tmp_path, kind, method, values
):
    flags = {**flags_by_kind[kind], "method": method, **values}
    folder = train_text(tmp_path / "run", **flags)
    parts = copied(folder, tmp_path / "parts")
    train_text(parts, **flags, resume_from_checkpoint="step-1", overwrite_output_dir=True)
    assert_same_run(folder, parts, "grad_norm", "heldout_loss")
    record = runlog.read_run(folder)
    assert record["status"] == "finished"
    # The file, loaded by PEFT or Transformers, has the scores that the run measured at its end.
    base = flags["model_name_or_path"]
    measured = heldout_of(base, folder)
    stored = {key: value for key, value in record["results"].items() if key in measured}
    assert stored == pytest.approx(measured, abs=1e-6)
    start, end = column(folder, "heldout_loss")
    assert abs(start - end) > 1e-4  # otherwise the comparison proves nothing
    if method == "full":
        check_model_and_tokenizer(folder, base)
    else:
        check_primary_adapter(folder, kind, flags)
        for _ in range(2):  # the second time, the export already exists
            assert export_step([str(folder), "--step", "2"]) == 0
        assert difference(folder / "exports" / "step-2", folder) == 0
        report = record["results"]["export"]
        assert report["readback_difference"] == 0.0
        assert report["parameters"] == sum(value.numel() for value in weights(folder).values())


def check_model_and_tokenizer(folder, base):
    assert not (folder / "adapter_model.safetensors").exists()
    base_tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer("hello there").input_ids == base_tokenizer("hello there").input_ids
    assert 'subfolder="model"' in (folder / "README.md").read_text()


def check_primary_adapter(folder, kind, flags):
    base = str(flags["model_name_or_path"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    assert (config["task_type"], config["peft_type"]) == (TASK_TYPES[kind], "LORA")
    assert config["inference_mode"] is True
    if "init_lora_weights" not in flags:  # with other initial values, the rank is doubled
        assert (config["r"], config["lora_alpha"]) == (4, 8)
    new_modules = NEW_MODULES.get(kind, [])
    assert bool(config["modules_to_save"]) == bool(new_modules)

    tensors = weights(folder)
    whole_modules = {key.rpartition(".")[0] for key in tensors if "lora_" not in key}
    assert whole_modules == {f"base_model.model.{name}" for name in new_modules}
    assert not [key for key in tensors if "auxiliary" in key or "initial" in key]
    if new_modules:
        labels = ("negative", "positive")
        initial = load_text_model(base, labels=labels).model.classifier.weight
        change = initial - tensors["base_model.model.classifier.weight"]
        assert change.abs().max() > 1e-3


@pytest.mark.slow
def test_accumulation_and_checkpointing_do_not_change_the_training(flags_by_kind, tmp_path):
    flags = {**flags_by_kind["seq2seq"], "train_batch_size": 8, "learning_rate": 1e-4}
    uncut = train_text(tmp_path / "uncut", **flags)
    flags |= {"train_batch_size": 1, "gradient_accumulation_steps": 8}
    cut = train_text(tmp_path / "cut", **flags, gradient_checkpointing=True)
    assert column(cut, "loss") == pytest.approx(column(uncut, "loss"), abs=1e-6)
    assert column(cut, "grad_norm") == pytest.approx(column(uncut, "grad_norm"), rel=1e-5)
    assert column(cut, "digest") == column(uncut, "digest")


@pytest.mark.parametrize("kind", ["causal", pytest.param("classification", marks=pytest.mark.slow)])
def test_evaluation_does_not_change_the_training(flags_by_kind, tmp_path, kind, capfd):
    flags = {**flags_by_kind[kind], "max_train_steps": 4}
    quiet = train_text(tmp_path / "quiet", **{**flags, "validation_file": None})
    evaluation = {
        "validation_loss_steps": 2,
        "validation_epochs": 1,
        "eval_on_start": True,
        "generation_max_new_tokens": 4,
        "max_predictions": 3,
    }
    evaluated = train_text(tmp_path / "evaluated", **{**flags, **evaluation})
    assert difference(quiet, evaluated) == 0
    rows = runlog.read_metrics(evaluated)
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 2, 4]
    # A classifier's accuracy is measured with its loss. Answers are generated at the start, after
    # each epoch (6 steps), and at the end.
    if kind == "classification":
        metric = "heldout_accuracy"
        metric_steps = [0, 2, 4]
        answer_folders = []
    else:
        metric = "heldout_exact_match"
        metric_steps = [0, 4]
        answer_folders = ["step-0", "step-4"]
    assert [row["step"] for row in rows if metric in row] == metric_steps
    answers = evaluated.rglob("predictions.jsonl")
    assert sorted(path.parent.name for path in answers) == answer_folders
    results = runlog.read_run(evaluated)["results"]
    for name in ("heldout_loss", metric):
        assert results[name] == column(evaluated, name)[-1]
    assert not (quiet / "validation").exists()
    assert "Map" not in capfd.readouterr().err  # the progress bar of tokenization


@pytest.mark.slow
def test_epochs_and_warm_up_are_converted_to_steps_and_packing_needs_fewer_steps(
    flags_by_kind, tmp_path
):
    flags = {**flags_by_kind["causal"], "max_train_steps": None, "num_train_epochs": 2}
    flags["train_batch_size"] = 8
    folder = train_text(tmp_path / "run", **flags, warmup_ratio=0.25)
    steps = [row["step"] for row in runlog.read_metrics(folder) if "lr" in row]
    assert steps == [1, 2, 3, 4, 5, 6]  # 2 epochs of 24 rows in batches of 8
    rates = column(folder, "lr")
    assert rates[:3] == pytest.approx([0, 5e-3, 1e-2])  # a quarter of 6 steps, rounded up to 2
    assert rates[2:] == sorted(rates[2:], reverse=True)
    packed = train_text(tmp_path / "packed", **flags, packing=True, max_length=128)
    assert 0 < len(column(packed, "loss")) < 6


@pytest.mark.slow
def test_a_small_t5_learns_64_answers_by_heart(tmp_path):
    rows = []
    for n in range(64):
        prompt = f"{WORDS[n % 16]} {WORDS[n // 16]}"
        answer = f"{NUMBERS[n % 5]} {WORDS[n % 7]}"
        rows.append({"prompt": prompt, "answer": answer})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {
        "model_name_or_path": save_t5(tmp_path / "t5", d_model=64, d_ff=128, d_kv=16),
        "train_file": file,
        "validation_file": file,
        "max_train_steps": 400,
        "rank": 32,
        "train_batch_size": 32,
        "learning_rate": 3e-3,
        "eval_on_start": True,
        "max_target_length": 8,
    }
    folder = train_text(tmp_path / "run", **flags)
    assert column(folder, "heldout_exact_match") == [0.0, 1.0]
    assert column(folder, "heldout_loss")[-1] < 0.05
    lines = (folder / "validation" / "step-400" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line)["prediction"] for line in lines]
    assert predictions == [row["answer"] for row in rows]


def test_a_run_that_has_learned_nothing_exports_nothing(flags_by_kind, tmp_path):
    warm_up = {"warmup_ratio": None, "lr_warmup_steps": 1}  # its only step has rate 0
    with pytest.raises(TrainingError, match="every B is zero"):
        train_text(tmp_path, **flags_by_kind["seq2seq"], **warm_up, max_train_steps=1)
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("norms", "is_lora"), [((0.0, 0.0), True), ((0.0, 0.1), False)])
def test_a_run_whose_auxiliary_stayed_zero_is_reported_as_plain_lora(
    tmp_path, caplog, norms, is_lora
):
    log = runlog.RunLog(tmp_path)
    log.start({}, method="bilora", seed=0, resume_step=None)
    for step, norm in enumerate(norms, start=1):
        log.metric(step, auxiliary_norm=norm)
    loop.warn_of_zero_auxiliary(tmp_path)
    assert ("plain LoRA" in caplog.text) == is_lora
