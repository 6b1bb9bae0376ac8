"""Benchmarks, subjects, recorded metrics, comparisons and the report; no model is loaded."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from eval.results import compare
from eval.subjects import Subject
from eval.text_scores import (
    PreparedBenchmark,
    TextScores,
    base_models,
    benchmarks,
    reporting,
)
from tests.eval.commands import result_of
from tests.eval.text_score_models import ROWS, save_record

MATTHEWS = "heldout_matthews_correlation"
LOSS = "heldout_loss"


def read_subjects(words, only_heldout=True):
    """Return the subjects of a command line, each with its base model."""
    arguments = [str(word) for word in words]
    args = TextScores.parser().read([*arguments, "--benchmarks", "x"])
    return base_models.read_subjects(args, only_heldout)


def make_run(folder, method="lora", seed=0, rows=ROWS, **config):
    """Write a run folder with arbitrary weights."""
    save_record(folder, method, seed, rows, **config)
    save_file({"A": torch.tensor([float(seed), len(method)])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    return folder


def make_adapter(folder):
    """Write a folder with an adapter's files but without a run's record."""
    (make_run(folder) / "run.json").unlink()
    return folder


def test_benchmarks_and_methods_have_the_papers_settings():
    chosen = benchmarks.choose([*benchmarks.PAPER, "local_task"], ["local_task"])
    by_name = {benchmark.name: benchmark for benchmark in chosen}
    shots = {name: b.num_fewshot for name, b in by_name.items() if b.engine == "harness"}
    assert shots == {"gsm8k": 0, "mmlu": 5, "drop": 3, "bbh": 3, "humaneval": 0, "local_task": None}
    assert by_name["bbh"].task == "bbh_fewshot"  # the harness's "bbh" uses chains of thought
    templates = {"gsm8k": "run", "mtbench": "run", "mmlu": "none", "humaneval": "none"}
    for name, template in templates.items():
        assert by_name[name].template == template
    passes = {"lora": 1, "bilora": 1, "lora-sam": 2, "flat-lora": 1, "full": 1}  # Table 3
    for name, count in passes.items():
        assert methods.get(name).passes == count


def test_runs_adapters_and_base_share_the_runs_base_model_and_settings(tmp_path):
    options: dict[str, Any] = {"template": "alpaca", "quantize": "nf4", "revision": "main"}
    run_folder = make_run(tmp_path / "run", "lora-sam", 3, **options)
    words = [run_folder, make_adapter(tmp_path / "b/run"), "base"]
    pairs = read_subjects(words, only_heldout=False)
    run, adapter, base = (subject for subject, _ in pairs)
    assert (run.kind, run.label) == ("run", "run")
    assert (adapter.kind, adapter.label) == ("file", "run-2")
    assert (base.kind, base.label, base.base_model) == ("base", "base", "owner/base")
    assert (run.method, run.seed, run.base_model) == ("lora-sam", 3, "owner/base")
    assert (run.about["cost"], run.about["quantize"]) == (2, "nf4")
    assert run.digest != adapter.digest
    for _, model in pairs:
        assert model.template == "alpaca"
    flags = ["--model_name_or_path", "local/copy", "--quantize", "none"]
    for _, model in read_subjects(words + flags, only_heldout=False):
        assert (model.name, model.revision, model.quantize) == ("local/copy", None, "none")


def test_a_subject_without_weights_or_a_unique_base_model_is_refused(tmp_path):
    bare, nameless = make_run(tmp_path / "bare"), make_adapter(tmp_path / "nameless")
    (bare / "adapter_model.safetensors").unlink()
    (nameless / "adapter_config.json").write_text("{}")
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", model_name_or_path="o/other")]
    for words, sentence in (
        ([bare], "bare .*adapter_model.safetensors"),
        ([nameless], "nameless .*--model_name_or_path"),
        (["base"], '"base".*--model_name_or_path'),
        ([*runs, "base"], '"base".*owner/base.*o/other'),
    ):
        with pytest.raises(UserError, match=sentence):
            read_subjects(words, only_heldout=False)


@pytest.mark.parametrize(
    ("metric", "title", "scale"),
    [("acc,none", "lambada (acc)", 100), ("word_perplexity,none", "lambada (word_perplexity)", 1)],
)
def test_a_harness_task_is_titled_and_scaled_by_its_metric(metric, title, scale):
    engine: Any = None
    lambada = PreparedBenchmark(benchmarks.Benchmark("lambada", "lambada"), engine, {})
    described_metric, _ = lambada.metric_and_settings(
        benchmarks.Measurement(0.5, [], {}, {"metric": metric})
    )
    assert (described_metric.title, described_metric.scale) == (title, scale)
    mmlu = PreparedBenchmark(benchmarks.PAPER["mmlu"], engine, {})
    described_metric, _ = mmlu.metric_and_settings(
        benchmarks.Measurement(0.5, [], {}, {"metric": "acc,none"})
    )
    assert (described_metric.title, described_metric.scale) == ("MMLU", 100)


def recorded_columns(words, names=("heldout",)):
    subjects = [subject for subject, _ in read_subjects(words)]
    return benchmarks.recorded_columns(subjects, names)


def test_a_recorded_metric_has_the_last_value_of_each_run(tmp_path):
    runs = [
        make_run(tmp_path / "a", rows=[(1, {MATTHEWS: 0.1, LOSS: 3.0}), (2, {MATTHEWS: 0.4})]),
        make_run(tmp_path / "b", "bilora", rows=[(2, {MATTHEWS: 0.6, LOSS: 1.0})]),
        make_run(tmp_path / "c", task="notes", rows=[(2, {LOSS: 2.0})]),
    ]
    score, loss = recorded_columns(runs)
    # A score is shown in percent. A task without a score is compared by its loss.
    assert (score.metric.title, score.metric.scale) == ("cola Matthews", 100)
    assert score.values == {"a": (2, 0.4), "b": (2, 0.6)}
    assert (loss.metric.scale, loss.values) == (1, {"c": (2, 2.0)})
    cola_loss, notes_loss = recorded_columns(runs, ["heldout_loss"])
    assert cola_loss.metric.title == "cola held-out loss"
    assert notes_loss.metric.title == "notes held-out loss"
    without_heldout = make_run(tmp_path / "silent", rows=[(1, {"loss": 1.0})])
    for words in ([without_heldout], ["base", "--model_name_or_path", "x"]):
        with pytest.raises(UserError, match="recorded"):
            recorded_columns(words)


def test_a_run_that_kept_its_best_weights_has_the_value_at_that_step(tmp_path):
    run = make_run(tmp_path / "best", rows=[(1, {LOSS: 3.0}), (2, {LOSS: 1.0}), (3, {LOSS: 2.0})])
    record = json.loads((run / "run.json").read_text())
    record["results"] = {"best_step": 2}  # as by --keep_best
    (run / "run.json").write_text(json.dumps(record))
    (column,) = recorded_columns([run])
    assert column.values == {"best": (2, 1.0)}


def test_a_seed_of_several_tasks_counts_once_and_their_scores_are_averaged(tmp_path):
    runs = []
    for task, score in (("cola", 0.25), ("mrpc", 0.5)):
        for seed in range(3):
            rows = [(1, {MATTHEWS: score})]
            runs.append(make_run(tmp_path / f"{task}{seed}", seed=seed, task=task, rows=rows))
    result_of(TextScores.main, tmp_path / "out", *runs, "--benchmarks", "heldout")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| LoRA (control) | 3 |" in report
    assert "| LoRA | 37.50 |" in report


def test_the_base_models_values_are_those_before_the_first_step_for_each_seed(tmp_path):
    words = ["base"]
    for method in ("lora", "bilora"):
        for seed in (0, 1):
            first_row = (0, {LOSS: 4.0 + seed})  # before the first step
            folder = tmp_path / f"{method}{seed}"
            words.append(str(make_run(folder, method, seed, [first_row, *ROWS])))
    base_subjects = [subject for subject, _ in read_subjects(words) if subject.group == "base"]
    for seed, subject in enumerate(base_subjects):
        assert (subject.label, subject.seed, subject.method) == (f"base-seed{seed}", seed, None)
    assert len(base_subjects) == 2
    accuracy, loss = recorded_columns(words, ["heldout", "heldout_loss"])
    assert len(accuracy.values) == 4  # the four runs; it was not measured before the first step
    assert loss.values["base-seed0"] == (0, 4.0)
    assert loss.values["base-seed1"] == (0, 5.0)


def summaries_of(scores):
    """Return group -> summary of one benchmark.

    Args:
        scores: group -> seed -> scores of items. A group's name is its method or "base".
    """
    subjects, rows = [], []
    for group, items_of_seed in scores.items():
        for seed, items in items_of_seed.items():
            subject = Subject(f"{group}-{seed}", group, method=group, seed=seed)
            if group == "base":
                subject = replace(subject, kind="base", method=None)
            subjects.append(subject)
            rows.append(subject.row("b", sum(items) / len(items)))
            for number, value in enumerate(items):
                rows.append(subject.row("b", value, item=f"q{number}"))
    lines = reporting.summaries(rows, ["b"], compare.control(subjects, None))
    return {line.group: line for line in lines}


def test_seeds_are_paired_if_at_least_two_are_common():
    lines = summaries_of(
        {"lora": {0: [0, 1], 1: [0, 0]}, "bilora": {0: [1, 1], 1: [0, 1], 7: [0, 0]}}
    )
    bilora, lora = lines["bilora"], lines["lora"]
    assert (bilora.control, bilora.over) == ("lora", "seed")
    assert (bilora.pairs, bilora.higher, bilora.difference) == (2, 2, 0.5)
    assert (lora.mean, lora.count, lora.error) == (0.25, 2, pytest.approx(0.25))


def test_items_are_paired_if_fewer_than_two_seeds_are_common():
    lines = summaries_of(
        {"lora": {0: [0, 1, 0, 0]}, "base": {None: [0, 0, 0, 0]}, "bilora": {1: [1, 1, 1, 0]}}
    )
    base, bilora = lines["base"], lines["bilora"]
    assert (base.over, base.pairs, base.difference, base.count) == ("item", 4, -0.25, 1)
    assert (bilora.difference, bilora.higher) == (0.5, 2)
    # Differences 1, 0, 1, 0 have variance 1/3; 3.182446 is Student's t for 3 degrees of freedom.
    assert bilora.difference_low == pytest.approx(0.5 - 3.182446 * (1 / 3) ** 0.5 / 4**0.5)
