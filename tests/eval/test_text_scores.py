"""Benchmarks, subjects and recorded figures, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.run.runlog import RunLog
from eval.text import benchmarks, costs, heldout, subjects
from eval.text.schema import PERCENT, POINTS

SHOTS: dict[str, Any] = {"num_fewshot": [], "template": None}


def arguments(*runs: Path | str, **values: Any) -> argparse.Namespace:
    names = ("model_name_or_path", "tokenizer_name", "revision", "cache_dir", "quantize")
    told = dict.fromkeys(names) | {"group": [], "trust_remote_code": False} | values
    return argparse.Namespace(runs=[str(run) for run in runs], **told)


def make_run(folder: Path, method: str = "lora", seed: int = 0, **values: Any) -> Path:
    """A run folder without weights that can be read."""
    figures, before = values.pop("figures", {"heldout_accuracy": 0.5}), values.pop("before", {})
    log = RunLog(folder)
    config = {"model_name_or_path": "owner/base", "task": "cola", "task_type": "causal"} | values
    log.start(config | {"method": method, "seed": seed}, method, seed, None)
    if before:
        log.metric(0, **before)
    log.metric(1, loss=1.0, heldout_loss=3.0)
    log.metric(2, **{"heldout_loss": 2.0} | figures)
    log.finish()
    (folder / "adapter_model.safetensors").write_bytes(f"{folder}".encode())
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    return folder


# Benchmarks ---------------------------------------------------------------------------------------


def test_the_papers_settings() -> None:
    found = {b.name: b for b in benchmarks.choose(",".join(benchmarks.PAPER), [], **SHOTS)}
    assert {name: b.num_fewshot for name, b in found.items() if b.engine == "harness"} == {
        "gsm8k": 0,
        "mmlu": 5,
        "drop": 3,
        "bbh": 3,
    }
    assert found["bbh"].task == "bbh_fewshot"  # the harness's "bbh" asks for a chain of thought
    assert found["mmlu"].template == "none"
    assert found["mtbench"].template == "run"


def test_examples_and_template_can_be_set() -> None:
    chosen = benchmarks.choose("mmlu, gsm8k,own", ["own"], ["2", "gsm8k=8"], "chat")
    assert [b.num_fewshot for b in chosen] == [2, 8, 2]
    assert {b.template for b in chosen} == {"chat"}
    assert benchmarks.harness_tasks("mmlu,bbh,heldout,own") == ["mmlu", "bbh_fewshot", "own"]


@pytest.mark.parametrize(
    ("names", "shots", "said"),
    [
        ("gsm8", [], r'no benchmark "gsm8" \(did you mean "gsm8k"\?\)'),
        ("", [], "--benchmarks names none"),
        ("mmlu,mmlu", [], 'names "mmlu" twice'),
        ("mmlu", ["-1"], '--num_fewshot "-1" is no number'),
        ("mmlu", ["many"], '--num_fewshot "many" is no number'),
        ("mmlu,humaneval", ["humaneval=3"], "names no benchmark that takes examples"),
        ("mmlu", ["mlu=3"], r'did you mean "mmlu"\?'),
    ],
)
def test_bad_benchmarks_are_refused(names: str, shots: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        benchmarks.choose(names, [], shots, None)


# Subjects -----------------------------------------------------------------------------------------


def test_seeds_of_a_method_are_one_row_and_training_sets_are_told_apart(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}-{task}-{seed}", method, seed, task=task)
        for method in ("lora", "bilora")
        for task in ("cola", "mrpc")
        for seed in (0, 1)
    ]
    found = subjects.gather(arguments(*runs, "base"), only_heldout=False)
    assert [s.group for s in found] == [
        *["LoRA, trained on cola"] * 2,
        *["Bi-LoRA, trained on cola"] * 2,
        *["LoRA, trained on mrpc"] * 2,
        *["Bi-LoRA, trained on mrpc"] * 2,
        "base",
    ]
    assert len({s.name for s in found}) == 9
    shared = subjects.gather(arguments(*runs), only_heldout=True)
    assert {s.group for s in shared} == {"LoRA", "Bi-LoRA"}
    own = subjects.gather(arguments(*runs[2:], group=[f"mine={runs[0]},{runs[1]}"]), True)
    assert [s.group for s in own][:2] == ["mine", "mine"]
    assert len(own) == 8


def test_what_a_subject_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "lora-sam", 3, template="alpaca", quantize="nf4")
    adapter = make_run(tmp_path / "b" / "run")
    (adapter / "run.json").unlink()
    found = subjects.gather(arguments(adapter, run, "base"), False)
    assert [(s.kind, s.name) for s in found] == [
        ("run", "run"),
        ("adapter", "run-2"),
        ("base", "base"),
    ]
    entry = found[0].entry()
    assert (entry.method, entry.cost, entry.seed, entry.quantize) == ("lora-sam", 2, 3, "nf4")
    assert [s.template for s in found] == ["alpaca"] * 3
    assert found[0].digest != found[1].digest


def test_the_command_line_says_what_the_base_model_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", revision="main", quantize="nf4")
    told = arguments(run, "base", model_name_or_path="local/copy", quantize="none")
    for subject in subjects.gather(told, False):
        assert (subject.base.name, subject.base.revision) == ("local/copy", None)
        assert subject.base.quantize == "none"


def test_what_can_not_be_scored_is_refused(tmp_path: Path) -> None:
    images = make_run(tmp_path / "images")
    record = json.loads((images / "run.json").read_text())
    del record["config"]["model_name_or_path"]
    (images / "run.json").write_text(json.dumps(record))
    bare = make_run(tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_model.safetensors").touch()
    nameless = make_run(tmp_path / "nameless")
    (nameless / "run.json").unlink()
    (nameless / "adapter_config.json").write_text("{}")
    cases: list[tuple[argparse.Namespace, str]] = [
        (arguments(), "nothing is given to score"),
        (arguments(images), "a run that makes images: score it by python -m eval.clip_scores"),
        (arguments(bare), "holds neither adapter_model.safetensors with adapter_config.json nor"),
        (arguments(tmp_path / "none"), "is no folder: name run folders"),
        (arguments(tmp_path / "empty"), "nor a PEFT adapter"),
        (arguments(tmp_path / "half"), "it has no adapter_config.json"),
        (arguments(nameless), "names no base model: give it by --model_name_or_path"),
        (arguments("base"), '"base" alone names no model'),
    ]
    for told, said in cases:
        with pytest.raises(UserError, match=said):
            subjects.gather(told, False)
    other = make_run(tmp_path / "other", model_name_or_path="owner/other")
    with pytest.raises(UserError, match='"base" could be several models'):
        subjects.gather(arguments(make_run(tmp_path / "one"), other, "base"), False)


@pytest.mark.parametrize(
    ("method", "steps"),
    [("lora", 1), ("bilora", 1), ("lora-sam", 2), ("flat-lora", 1), ("full", 1)],
)
def test_costs_are_those_of_table_3(method: str, steps: int) -> None:
    assert costs.gradient_steps(method) == steps


# Recorded figures ---------------------------------------------------------------------------------


def test_the_last_recorded_value_of_each_run(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", figures={"heldout_matthews": 0.4}),
        make_run(tmp_path / "b", "bilora", figures={"heldout_matthews": 0.6}),
        make_run(tmp_path / "c", task="notes", figures={}),
    ]
    found = heldout.columns(subjects.gather(arguments(*runs), True), ["heldout"])
    assert [(c.title, c.unit, c.higher_is_better) for c, _ in found] == [
        ("cola Matthews", PERCENT, True),
        ("notes held-out loss", POINTS, False),
    ]
    assert {k: m.value for k, m in found[0][1].items()} == {0: 0.4, 1: 0.6}
    assert {k: m.value for k, m in found[1][1].items()} == {2: 2.0}
    losses = heldout.columns(subjects.gather(arguments(*runs), True), ["heldout_loss"])
    assert [c.title for c, _ in losses] == ["cola held-out loss", "notes held-out loss"]


def test_the_base_model_is_what_the_runs_of_each_seed_met(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}{seed}", method, seed, before={"heldout_loss": 4.0 + seed})
        for method in ("lora", "bilora")
        for seed in (0, 1)
    ]
    found = subjects.gather(arguments(*runs, "base"), only_heldout=True)
    entries = [subject.entry() for subject in found]
    assert [(e.name, e.group, e.kind, e.seed, e.method, e.cost) for e in entries[4:]] == [
        ("base-seed0", "base", "base", 0, None, None),
        ("base-seed1", "base", "base", 1, None, None),
    ]
    assert all(e.peak_memory for e in entries[:4])
    assert {e.peak_memory for e in entries[4:]} == {None}
    (accuracy_column, accuracy), (_, loss) = heldout.columns(found, ["heldout", "heldout_loss"])
    assert accuracy_column.title == "accuracy"
    assert set(accuracy) == {0, 1, 2, 3}  # not measured before the first step
    assert {k: (m.value, m.details["step"]) for k, m in loss.items() if k > 3} == {
        4: (4.0, 0),
        5: (5.0, 0),
    }


def test_what_recorded_nothing_is_refused(tmp_path: Path) -> None:
    silent = make_run(tmp_path / "silent")
    (silent / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="recorded no held-out figure"):
        heldout.columns(subjects.gather(arguments(silent), True), ["heldout"])
    bare = subjects.gather(arguments("base", model_name_or_path="x"), True)
    with pytest.raises(UserError, match="base has no recorded figures"):
        heldout.columns(bare, ["heldout"])
