"""Benchmarks, subjects and recorded figures, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion.errors import UserError
from eval.subjects import Subject
from eval.text_scores import TextScores, bases, benchmarks, costs, heldout
from tests.eval.text_score_models import ROWS, Rows, save_record

MATTHEWS, LOSS = "heldout_matthews", "heldout_loss"
SHOTS: dict[str, Any] = {"num_fewshot": [], "template": None}


def arguments(*words: Path | str) -> argparse.Namespace:
    return TextScores.parser().read([*map(str, words), "--benchmarks", "heldout"])


def gather(*words: Path | str, only_heldout: bool = False) -> list[Subject]:
    return [subject for subject, _ in bases.gather(arguments(*words), only_heldout)]


def make_run(
    folder: Path, method: str = "lora", seed: int = 0, rows: Rows = ROWS, **config: Any
) -> Path:
    """A run folder with weights of nothing."""
    save_record(folder, method, seed, rows, **config)
    save_file({"A": torch.tensor([float(seed), len(method)])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    return folder


# Benchmarks ---------------------------------------------------------------------------------------


def test_the_papers_settings() -> None:
    found = {b.name: b for b in benchmarks.choose(",".join(benchmarks.PAPER), [], **SHOTS)}
    shots = {name: b.num_fewshot for name, b in found.items() if b.engine == "harness"}
    assert shots == {"gsm8k": 0, "mmlu": 5, "drop": 3, "bbh": 3}
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
        ("gsm8", [], r'"gsm8" \(did you mean "gsm8k"\?\)'),
        ("", [], "--benchmarks .* gsm8k"),
        ("mmlu,mmlu", [], '"mmlu" twice'),
        ("mmlu", ["-1"], '--num_fewshot "-1" .* NAME=N'),
        ("mmlu", ["many"], '--num_fewshot "many" .* NAME=N'),
        ("mmlu,humaneval", ["humaneval=3"], '"humaneval=3" .* use one of mmlu'),
        ("mmlu", ["mlu=3"], r'did you mean "mmlu"\?'),
    ],
)
def test_bad_benchmarks_are_refused(names: str, shots: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        benchmarks.choose(names, [], shots, None)


# Subjects -----------------------------------------------------------------------------------------


def test_seeds_of_a_method_are_one_row_and_training_sets_are_told_apart(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}-{task}-{seed}", method, seed, task=task, learning_rate=rate)
        for task, rate in (("cola", 1e-3), ("mrpc", 1e-4))
        for method in ("lora", "bilora")
        for seed in (0, 1)
    ]
    found = gather(*runs, "base")
    groups = [f"{m}, trained on {t}" for t in ("cola", "mrpc") for m in ("LoRA", "Bi-LoRA")]
    assert {s.group for s in found} == {*groups, "base"}
    assert all(sum(s.group == group for s in found) == 2 for group in groups)
    assert len({s.label for s in found}) == 9
    assert {s.group for s in gather(*runs, only_heldout=True)} == {"LoRA", "Bi-LoRA"}
    own = gather(*runs[2:], "--group", f"mine={runs[0]},{runs[1]}")
    assert [s.group for s in own].count("mine") == 2
    assert len(own) == 8


def test_what_a_subject_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "lora-sam", 3, template="alpaca", quantize="nf4")
    adapter = make_run(tmp_path / "b" / "run")
    (adapter / "run.json").unlink()
    pairs = bases.gather(arguments(run, adapter, "base"), False)
    found = [subject for subject, _ in pairs]
    assert [(s.kind, s.label) for s in found] == [
        ("run", "run"),
        ("file", "run-2"),
        ("base", "base"),
    ]
    assert (found[0].method, found[0].seed) == ("lora-sam", 3)
    assert found[0].about["cost"] == 2
    assert found[0].about["quantize"] == "nf4"
    assert [base.template for _, base in pairs] == ["alpaca"] * 3
    assert found[0].digest != found[1].digest


def test_the_command_line_says_what_the_base_model_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", revision="main", quantize="nf4")
    flags = ("--model_name_or_path", "local/copy", "--quantize", "none")
    for _, base in bases.gather(arguments(run, "base", *flags), False):
        assert (base.name, base.revision, base.quantize) == ("local/copy", None, "none")


def test_what_can_not_be_scored_is_refused(tmp_path: Path) -> None:
    images = make_run(tmp_path / "images")
    record = json.loads((images / "run.json").read_text())
    del record["config"]["model_name_or_path"]
    (images / "run.json").write_text(json.dumps(record))
    lora = {f"unet.a.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    save_file(lora, images / "pytorch_lora_weights.safetensors")
    bare = make_run(tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    nameless = make_run(tmp_path / "nameless")
    (nameless / "run.json").unlink()
    (nameless / "adapter_config.json").write_text("{}")
    half = make_run(tmp_path / "half")
    (half / "run.json").unlink()
    (half / "adapter_config.json").unlink()
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "b", model_name_or_path="o/other")
    cases: list[tuple[list[Path | str], str]] = [
        ([], "nothing is given"),
        ([images], "images.* eval.clip_scores"),
        ([bare], "bare .*adapter_model.safetensors"),
        ([tmp_path / "none"], "none.*correct the path"),
        ([tmp_path / "empty"], "empty .*adapter_model.safetensors"),
        ([half], "half .*adapter_config.json"),
        ([nameless], "nameless .*--model_name_or_path"),
        (["base"], '"base".*--model_name_or_path'),
        ([one, other, "base"], '"base".*owner/base.*o/other'),
    ]
    for words, told in cases:
        with pytest.raises(UserError, match=told):
            gather(*words)


@pytest.mark.parametrize(
    ("method", "steps"),
    [("lora", 1), ("bilora", 1), ("lora-sam", 2), ("flat-lora", 1), ("full", 1)],
)
def test_costs_are_those_of_table_3(method: str, steps: int) -> None:
    assert costs.gradient_steps(method) == steps


# Recorded figures ---------------------------------------------------------------------------------


def test_the_last_recorded_value_of_each_run(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", rows=[(1, {MATTHEWS: 0.1, LOSS: 3.0}), (2, {MATTHEWS: 0.4})]),
        make_run(tmp_path / "b", "bilora", rows=[(2, {MATTHEWS: 0.6, LOSS: 1.0})]),
        make_run(tmp_path / "c", task="notes", rows=[(2, {LOSS: 2.0})]),
    ]
    found = heldout.columns(gather(*runs, only_heldout=True), ["heldout"])
    assert [(c.metric.title, c.metric.scale, c.metric.higher_is_better) for c in found] == [
        ("cola Matthews", 100, True),
        ("notes held-out loss", 1, False),
    ]
    assert [c.values for c in found] == [{"a": (2, 0.4), "b": (2, 0.6)}, {"c": (2, 2.0)}]
    losses = heldout.columns(gather(*runs, only_heldout=True), ["heldout_loss"])
    assert [c.metric.title for c in losses] == ["cola held-out loss", "notes held-out loss"]


def test_the_base_model_is_what_the_runs_of_each_seed_met(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}{seed}", method, seed, [(0, {LOSS: 4.0 + seed}), *ROWS])
        for method in ("lora", "bilora")
        for seed in (0, 1)
    ]
    found = gather(*runs, "base", only_heldout=True)
    assert [(s.label, s.group, s.kind, s.seed, s.method) for s in found[4:]] == [
        ("base-seed0", "base", "base", 0, None),
        ("base-seed1", "base", "base", 1, None),
    ]
    assert [bool(s.about.get("peak_memory")) for s in found] == [True] * 4 + [False] * 2
    accuracy, loss = heldout.columns(found, ["heldout", "heldout_loss"])
    assert accuracy.metric.title == "accuracy"
    assert len(accuracy.values) == 4  # not measured before the first step
    assert loss.values["base-seed0"] == (0, 4.0)
    assert loss.values["base-seed1"] == (0, 5.0)


def test_what_recorded_nothing_is_refused(tmp_path: Path) -> None:
    silent = make_run(tmp_path / "silent")
    (silent / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for words in ([silent], ["base", "--model_name_or_path", "x"]):
        with pytest.raises(UserError, match="recorded"):
            heldout.columns(gather(*words, only_heldout=True), ["heldout"])
