"""FSDP2 on two processes gives the losses, norms, weights, files and answers of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion.run import runlog
from tests.scripts.runs import column, difference, run_python, weights
from tests.text.text_builders import SAVERS, rows_for, text_flags, train_text, write_rows

ENGINE = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fsdp")]

CASES: dict[str, dict[str, Any]] = {
    "causal-bilora": {"checkpointing_steps": 2, "max_grad_norm": 0.01},
    "seq2seq-bilora": {"checkpointing_steps": 2, "use_dora": True},
    "classification-bilora": {},
    "causal-lora-sam": {"gradient_checkpointing": True},
    "causal-lora": {"mixed_precision": "bf16"},
}
"""Flags of each run, by kind of model and method."""


def options(folder, name, processes):
    """Return the flags of one case; a step has eight rows on any number of processes."""
    kind, _, method = name.partition("-")
    return {
        "model_name_or_path": folder / kind,
        "task_type": kind,
        "method": method,
        "train_file": folder / f"{kind}.jsonl",
        "validation_file": folder / f"{kind}-heldout.jsonl",
        "max_train_steps": 4,
        "validation_loss_steps": 2,
        "max_new_tokens": 4,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 4 // processes,
        **CASES[name],
    }


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Train each case on one process and, under FSDP2, on two; resume one run on two."""
    folder = tmp_path_factory.mktemp("fsdp")
    for kind, save in SAVERS.items():
        save(folder / kind)
        write_rows(folder / f"{kind}.jsonl", rows_for(kind, 24))
        write_rows(folder / f"{kind}-heldout.jsonl", rows_for(kind, 5, first=40))
    two = folder / "two"
    command_lines = []
    for name in CASES:
        command_lines.append(text_flags(two / name, **options(folder, name, 2)))
    middle = two / "causal-bilora" / "checkpoints" / "step-2"
    resumed = options(folder, "causal-bilora", 2) | {"resume_from_checkpoint": middle}
    command_lines.append(text_flags(two / "resumed", **resumed))
    file = folder / "lines.json"
    file.write_text(json.dumps(command_lines))
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    # The environment selects FSDP2 in accelerate; the script checks that weights are sharded.
    run_python([script, file], processes=2, environment=ENGINE)
    for name in CASES:
        train_text(folder / "one" / name, **options(folder, name, 1))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_results_of_one(setting, name):
    """Metrics, weights, answers and file names are the same; checkpoints have unsharded tensors."""
    single = setting / "one" / name
    double = setting / "two" / name
    tolerance = 1e-5 if "mixed_precision" not in CASES[name] else 2e-3
    single_rows = runlog.read_metrics(single)
    double_rows = runlog.read_metrics(double)
    assert len(single_rows) > 4
    for expected, row in zip(single_rows, double_rows, strict=True):
        assert row.keys() == expected.keys()
        for key in expected.keys() - {"seconds", "time"}:
            value = expected[key]
            close = pytest.approx(value, abs=tolerance) if isinstance(value, float) else value
            assert row[key] == close, key
    assert difference(single, double) < tolerance
    assert not any("auxiliary" in key for key in weights(double))

    names = sorted(path.relative_to(single) for path in single.rglob("*"))
    assert names == sorted(path.relative_to(double) for path in double.rglob("*"))
    for path in names:
        if path.name == "predictions.jsonl" and "bilora" in name:
            assert (single / path).read_text() == (double / path).read_text()
        if path.parts[0] == "checkpoints" and path.suffix == ".safetensors":
            expected_tensors = load_file(single / path)
            tensors = load_file(double / path)
            assert tensors.keys() == expected_tensors.keys()
            for key, value in expected_tensors.items():
                torch.testing.assert_close(tensors[key], value, rtol=0, atol=tolerance)


def test_a_resumed_run_is_exact_and_one_process_can_resume_a_run_of_two(setting):
    uninterrupted = setting / "two" / "causal-bilora"
    resumed = setting / "two" / "resumed"
    assert difference(uninterrupted, resumed) == 0
    assert column(uninterrupted, "loss")[-2:] == column(resumed, "loss")[-2:]
    flags = options(setting, "causal-bilora", 1)
    flags["resume_from_checkpoint"] = uninterrupted / "checkpoints" / "step-2"
    assert difference(train_text(setting / "one" / "resumed", **flags), uninterrupted) < 1e-5
