"""Benchmarks, subjects, recorded figures, comparisons and the report, without a model."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from eval import compare
from eval.subjects import Subject
from eval.table import Metric, Result
from eval.text_scores import TextScores, bases, benchmarks, reporting
from tests.eval.text_score_models import ROWS, save_record

MATTHEWS, LOSS = "heldout_matthews_correlation", "heldout_loss"


def pairs(*words, only_heldout=False):
    args: argparse.Namespace = TextScores.parser().read([*map(str, words), "--benchmarks", "x"])
    return bases.gather(args, only_heldout)


def gather(*words, only_heldout=True):
    return [subject for subject, _ in pairs(*words, only_heldout=only_heldout)]


def make_run(folder, method="lora", seed=0, rows=ROWS, **config):
    """A run folder with weights of nothing."""
    save_record(folder, method, seed, rows, **config)
    save_file({"A": torch.tensor([float(seed), len(method)])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    return folder


def make_adapter(folder):
    """The same without the record of a run."""
    (make_run(folder) / "run.json").unlink()
    return folder


def test_the_papers_settings():
    found = {b.name: b for b in benchmarks.choose(",".join(benchmarks.PAPER), [])}
    shots = {name: b.num_fewshot for name, b in found.items() if b.engine == "harness"}
    assert shots == {"gsm8k": 0, "mmlu": 5, "drop": 3, "bbh": 3}
    assert found["bbh"].task == "bbh_fewshot"  # the harness's "bbh" asks for a chain of thought
    assert found["mmlu"].template == "none"
    assert found["mtbench"].template == "run"
    chosen = benchmarks.choose("mmlu, gsm8k,own", ["own"])
    assert [b.num_fewshot for b in chosen] == [5, 0, None]
    names = ("lora", "bilora", "lora-sam", "flat-lora", "full")
    assert [methods.get(name).passes for name in names] == [1, 1, 2, 1, 1]  # Table 3


def test_what_a_subject_and_its_base_model_are(tmp_path):
    options: dict[str, Any] = {"template": "alpaca", "quantize": "nf4", "revision": "main"}
    words = [make_run(tmp_path / "run", "lora-sam", 3, **options), make_adapter(tmp_path / "b/run")]
    found = pairs(*words, "base")
    (run, _), (adapter, _), (base, _) = found
    assert [(s.kind, s.label) for s, _ in found] == [
        *(("run", "run"), ("file", "run-2"), ("base", "base"))
    ]
    assert (run.method, run.seed, run.base_model) == ("lora-sam", 3, "owner/base")
    assert (run.about["cost"], run.about["quantize"]) == (2, "nf4")
    assert [one.template for _, one in found] == ["alpaca"] * 3
    assert run.digest != adapter.digest
    assert base.base_model == "owner/base"
    flags = ("--model_name_or_path", "local/copy", "--quantize", "none")
    for _, told in pairs(*words, "base", *flags):
        assert (told.name, told.revision, told.quantize) == ("local/copy", None, "none")


def test_what_has_no_one_base_model_is_refused(tmp_path):
    bare, nameless = make_run(tmp_path / "bare"), make_adapter(tmp_path / "nameless")
    (bare / "adapter_model.safetensors").unlink()
    (nameless / "adapter_config.json").write_text("{}")
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "b", model_name_or_path="o/other")
    cases: list[tuple[list[Path | str], str]] = [
        ([bare], "bare .*adapter_model.safetensors"),
        ([nameless], "nameless .*--model_name_or_path"),
        (["base"], '"base".*--model_name_or_path'),
        ([one, other, "base"], '"base".*owner/base.*o/other'),
    ]
    for words, told in cases:
        with pytest.raises(UserError, match=told):
            pairs(*words)


def test_the_last_recorded_value_of_each_run(tmp_path):
    runs = [
        make_run(tmp_path / "a", rows=[(1, {MATTHEWS: 0.1, LOSS: 3.0}), (2, {MATTHEWS: 0.4})]),
        make_run(tmp_path / "b", "bilora", rows=[(2, {MATTHEWS: 0.6, LOSS: 1.0})]),
        make_run(tmp_path / "c", task="notes", rows=[(2, {LOSS: 2.0})]),
    ]
    found = benchmarks.columns(gather(*runs), ["heldout"])
    assert [(c.metric.title, c.metric.scale, c.metric.higher_is_better) for c in found] == [
        ("cola Matthews", 100, True),
        ("notes held-out loss", 1, False),
    ]
    assert [c.values for c in found] == [{"a": (2, 0.4), "b": (2, 0.6)}, {"c": (2, 2.0)}]
    losses = benchmarks.columns(gather(*runs), ["heldout_loss"])
    assert [c.metric.title for c in losses] == ["cola held-out loss", "notes held-out loss"]
    best = make_run(tmp_path / "best", rows=[(1, {LOSS: 3.0}), (2, {LOSS: 1.0}), (3, {LOSS: 2.0})])
    record = json.loads((best / "run.json").read_text())
    record["results"] = {"best_step": 2}  # --keep_best left the weights of that step
    (best / "run.json").write_text(json.dumps(record))
    assert benchmarks.recorded(gather(best)[0]) == {LOSS: (2, 1.0)}
    silent = make_run(tmp_path / "silent", rows=[(1, {"loss": 1.0})])
    for words in ([silent], ["base", "--model_name_or_path", "x"]):
        with pytest.raises(UserError, match="recorded"):
            benchmarks.columns(gather(*words), ["heldout"])


def test_a_seed_of_several_tasks_counts_once_and_their_scores_are_averaged(tmp_path):
    runs = [
        make_run(tmp_path / f"{task}{seed}", seed=seed, task=task, rows=[(1, {MATTHEWS: score})])
        for task, score in (("cola", 0.25), ("mrpc", 0.5))
        for seed in range(3)
    ]
    where = ["--output_dir", str(tmp_path / "out")]
    assert TextScores.main([*map(str, runs), "--benchmarks", "heldout", *where]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| LoRA (control) | 3 |" in report
    assert "| LoRA | 37.50 |" in report


def test_the_base_model_is_what_the_runs_of_each_seed_met(tmp_path):
    runs = [
        make_run(tmp_path / f"{method}{seed}", method, seed, [(0, {LOSS: 4.0 + seed}), *ROWS])
        for method in ("lora", "bilora")
        for seed in (0, 1)
    ]
    found = gather(*runs, "base")
    assert [(s.label, s.group, s.kind, s.seed, s.method) for s in found[4:]] == [
        ("base-seed0", "base", "base", 0, None),
        ("base-seed1", "base", "base", 1, None),
    ]
    assert [bool(s.about.get("peak_memory")) for s in found] == [True] * 4 + [False] * 2
    accuracy, loss = benchmarks.columns(found, ["heldout", "heldout_loss"])
    assert accuracy.metric.title == "accuracy"
    assert len(accuracy.values) == 4  # not measured before the first step
    assert (loss.values["base-seed0"], loss.values["base-seed1"]) == ((0, 4.0), (0, 5.0))


Scores = dict[str, dict[int | None, list[float]]]
SHARE = Metric("Bench", "", True, 100.0, ".2f")


def result(scores, peaks=()):
    """A result of one benchmark: group -> seed -> scores of items; and each run's peak memory."""
    subjects, rows = [], []
    for group, seeds in scores.items():
        kind, method, cost = ("base", None, None) if group == "base" else ("run", group, 1)
        for seed, items in seeds.items():
            about = {"cost": cost, "peak_memory": (*peaks, *[None] * 9)[len(subjects)]}
            subject = Subject(f"{group}-{seed}", group, kind, method=method, seed=seed, about=about)
            subjects.append(subject)
            rows.append(subject.row("b", sum(items) / len(items)))
            rows += [subject.row("b", v, item=f"q{n}") for n, v in enumerate(items)]
    control = compare.control(subjects, None)
    lines = reporting.summaries(rows, ["b"], control)
    settings = {"benchmarks": {"b": {"num_fewshot": 5}}}
    return Result(
        "text_scores", subjects, {"b": SHARE}, control, settings, rows=rows, summaries=lines
    )


def test_seeds_are_paired_where_there_are_two():
    found = result({"lora": {0: [0, 1], 1: [0, 0]}, "bilora": {0: [1, 1], 1: [0, 1], 7: [0, 0]}})
    lora, bilora = found.summary("lora", "b"), found.summary("bilora", "b")
    assert (bilora.control, bilora.over, bilora.pairs, bilora.higher) == ("lora", "seed", 2, 2)
    assert bilora.difference == 0.5
    assert (lora.mean, lora.count, lora.error) == (0.25, 2, pytest.approx(0.25))


def test_items_are_paired_where_there_are_not_and_the_score_is_their_mean():
    found = result(
        {"lora": {0: [0, 1, 0, 0]}, "base": {None: [0, 0, 0, 0]}, "bilora": {1: [1, 1, 1, 0]}}
    )
    base, bilora = found.summary("base", "b"), found.summary("bilora", "b")
    assert (base.over, base.pairs, base.difference, base.count) == ("item", 4, -0.25, 1)
    assert (bilora.difference, bilora.higher) == (0.5, 2)
    assert bilora.difference_low == pytest.approx(0.5 - 3.182446 * (1 / 3) ** 0.5 / 2)
