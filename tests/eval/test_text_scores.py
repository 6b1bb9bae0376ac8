"""Benchmarks, subjects, recorded figures, comparisons and the report, without a model."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from eval import compare
from eval.subjects import Subject
from eval.text_scores import TextScores, base_models, benchmarks, reporting
from tests.eval.text_score_models import ROWS, save_record

MATTHEWS, LOSS = "heldout_matthews_correlation", "heldout_loss"


def read_subjects(*words, only_heldout=True):
    args = TextScores.parser().read([*map(str, words), "--benchmarks", "x"])
    return base_models.read_subjects(args, only_heldout)


def make_run(folder, method="lora", seed=0, rows=ROWS, **config):
    """A run folder whose weights mean nothing."""
    save_record(folder, method, seed, rows, **config)
    save_file({"A": torch.tensor([float(seed), len(method)])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    return folder


def make_adapter(folder):
    """The same without the record of a run."""
    (make_run(folder) / "run.json").unlink()
    return folder


def test_the_papers_settings():
    chosen = benchmarks.choose([*benchmarks.PAPER, "local_task"], ["local_task"])
    by_name = {benchmark.name: benchmark for benchmark in chosen}
    shots = {name: b.num_fewshot for name, b in by_name.items() if b.engine == "harness"}
    assert shots == {"gsm8k": 0, "mmlu": 5, "drop": 3, "bbh": 3, "humaneval": 0, "local_task": None}
    assert by_name["bbh"].task == "bbh_fewshot"  # the harness's "bbh" asks for a chain of thought
    templates = {"gsm8k": "run", "mtbench": "run", "mmlu": "none", "humaneval": "none"}
    assert {name: by_name[name].template for name in templates} == templates
    passes = {"lora": 1, "bilora": 1, "lora-sam": 2, "flat-lora": 1, "full": 1}  # Table 3
    assert {name: methods.get(name).passes for name in passes} == passes


def test_runs_adapters_and_base_have_the_base_model_of_the_runs(tmp_path):
    options: dict[str, Any] = {"template": "alpaca", "quantize": "nf4", "revision": "main"}
    words = [make_run(tmp_path / "run", "lora-sam", 3, **options), make_adapter(tmp_path / "b/run")]
    pairs = read_subjects(*words, "base", only_heldout=False)
    (run, _), (adapter, _), (base, _) = pairs
    labels = [(subject.kind, subject.label) for subject, _ in pairs]
    assert labels == [("run", "run"), ("file", "run-2"), ("base", "base")]
    assert (run.method, run.seed, run.base_model) == ("lora-sam", 3, "owner/base")
    assert (run.about["cost"], run.about["quantize"]) == (2, "nf4")
    assert run.digest != adapter.digest
    assert base.base_model == "owner/base"
    assert {model.template for _, model in pairs} == {"alpaca"}
    flags = ("--model_name_or_path", "local/copy", "--quantize", "none")
    for _, model in read_subjects(*words, "base", *flags, only_heldout=False):
        assert (model.name, model.revision, model.quantize) == ("local/copy", None, "none")


def test_a_subject_without_one_base_model_is_refused(tmp_path):
    bare, nameless = make_run(tmp_path / "bare"), make_adapter(tmp_path / "nameless")
    (bare / "adapter_model.safetensors").unlink()
    (nameless / "adapter_config.json").write_text("{}")
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", model_name_or_path="o/other")
    for words, sentence in (
        ([bare], "bare .*adapter_model.safetensors"),
        ([nameless], "nameless .*--model_name_or_path"),
        (["base"], '"base".*--model_name_or_path'),
        ([*runs, "base"], '"base".*owner/base.*o/other'),
    ):
        with pytest.raises(UserError, match=sentence):
            read_subjects(*words, only_heldout=False)


def columns_of(words, names=("heldout",)):
    return benchmarks.recorded_columns([subject for subject, _ in read_subjects(*words)], names)


def test_the_last_recorded_value_of_each_run(tmp_path):
    runs = [
        make_run(tmp_path / "a", rows=[(1, {MATTHEWS: 0.1, LOSS: 3.0}), (2, {MATTHEWS: 0.4})]),
        make_run(tmp_path / "b", "bilora", rows=[(2, {MATTHEWS: 0.6, LOSS: 1.0})]),
        make_run(tmp_path / "c", task="notes", rows=[(2, {LOSS: 2.0})]),
    ]
    score, loss = columns_of(runs)
    assert (score.metric.title, score.metric.scale, loss.metric.scale) == ("cola Matthews", 100, 1)
    assert (score.values, loss.values) == ({"a": (2, 0.4), "b": (2, 0.6)}, {"c": (2, 2.0)})
    titles = [column.metric.title for column in columns_of(runs, ["heldout_loss"])]
    assert titles == ["cola held-out loss", "notes held-out loss"]

    best = make_run(tmp_path / "best", rows=[(1, {LOSS: 3.0}), (2, {LOSS: 1.0}), (3, {LOSS: 2.0})])
    record = json.loads((best / "run.json").read_text())
    record["results"] = {"best_step": 2}  # --keep_best left the weights of that step
    (best / "run.json").write_text(json.dumps(record))
    assert columns_of([best])[0].values == {"best": (2, 1.0)}
    silent = make_run(tmp_path / "silent", rows=[(1, {"loss": 1.0})])
    for words in ([silent], ["base", "--model_name_or_path", "x"]):
        with pytest.raises(UserError, match="recorded"):
            columns_of(words)


def test_a_seed_of_several_tasks_counts_once_and_their_scores_are_averaged(tmp_path):
    runs = []
    for task, score in (("cola", 0.25), ("mrpc", 0.5)):
        for seed in range(3):
            rows = [(1, {MATTHEWS: score})]
            runs.append(str(make_run(tmp_path / f"{task}{seed}", seed=seed, task=task, rows=rows)))
    folder = tmp_path / "out"
    assert TextScores.main([*runs, "--benchmarks", "heldout", "--output_dir", str(folder)]) == 0
    report = (folder / "report.md").read_text()
    assert "| LoRA (control) | 3 |" in report
    assert "| LoRA | 37.50 |" in report


def test_the_base_model_is_what_the_runs_of_each_seed_measured_first(tmp_path):
    runs = [
        make_run(tmp_path / f"{method}{seed}", method, seed, [(0, {LOSS: 4.0 + seed}), *ROWS])
        for method in ("lora", "bilora")
        for seed in (0, 1)
    ]
    subjects = [subject for subject, _ in read_subjects(*runs, "base")]
    assert [(s.label, s.group, s.seed, s.method) for s in subjects[4:]] == [
        ("base-seed0", "base", 0, None),
        ("base-seed1", "base", 1, None),
    ]
    accuracy, loss = columns_of([*runs, "base"], ["heldout", "heldout_loss"])
    assert len(accuracy.values) == 4  # not measured before the first step
    assert (loss.values["base-seed0"], loss.values["base-seed1"]) == ((0, 4.0), (0, 5.0))


def summaries_of(scores):
    """Group -> summary of one benchmark, from group -> seed -> scores of items."""
    subjects, rows = [], []
    for group, by_seed in scores.items():
        kind, method = ("base", None) if group == "base" else ("run", group)
        for seed, items in by_seed.items():
            subject = Subject(f"{group}-{seed}", group, kind, method=method, seed=seed)
            subjects.append(subject)
            rows.append(subject.row("b", sum(items) / len(items)))
            for number, value in enumerate(items):
                rows.append(subject.row("b", value, item=f"q{number}"))
    lines = reporting.summaries(rows, ["b"], compare.control(subjects, None))
    return {line.group: line for line in lines}


def test_seeds_are_paired_where_there_are_two():
    lines = summaries_of(
        {"lora": {0: [0, 1], 1: [0, 0]}, "bilora": {0: [1, 1], 1: [0, 1], 7: [0, 0]}}
    )
    bilora, lora = lines["bilora"], lines["lora"]
    assert (bilora.control, bilora.over, bilora.pairs, bilora.higher) == ("lora", "seed", 2, 2)
    assert bilora.difference == 0.5
    assert (lora.mean, lora.count, lora.error) == (0.25, 2, pytest.approx(0.25))


def test_items_are_paired_where_there_are_not_and_the_score_is_their_mean():
    lines = summaries_of(
        {"lora": {0: [0, 1, 0, 0]}, "base": {None: [0, 0, 0, 0]}, "bilora": {1: [1, 1, 1, 0]}}
    )
    base, bilora = lines["base"], lines["bilora"]
    assert (base.over, base.pairs, base.difference, base.count) == ("item", 4, -0.25, 1)
    assert (bilora.difference, bilora.higher) == (0.5, 2)
    assert bilora.difference_low == pytest.approx(0.5 - 3.182446 * (1 / 3) ** 0.5 / 2)
