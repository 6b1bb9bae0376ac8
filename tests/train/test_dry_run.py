"""A dry run's memory estimate, compared with a trace of every tensor (commit 48c0e54)."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.methods import Target
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.task import memory_by_phase
from bilora_diffusion.train.dry_run import STEP, attach_copy, empty
from docs.memory import FOLDER, step_memory
from tests.scripts.runs import words

pytestmark = pytest.mark.usefixtures("hub")


def read_table(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


IMAGE_MODELS = read_table("table.json")
TEXT_CASE = "{model} {rows}x{tokens} {mixed_precision} {gradient_checkpointing}"
SLOW = ("Stable", "FLUX", "Z-Image", "Qwen-Image", "Krea", "Llama")


def parameter(name, *values):
    """Return a test case with this name; large models get the mark `slow`."""
    marks = [pytest.mark.slow] if name.startswith(SLOW) else []
    return pytest.param(*values, marks=marks, id=name)


def wrong_bytes(model):
    """Return how many bytes too many the trace counted for this model.

    It counted SD3's table of positions in fp32, but a run keeps the table in bf16.
    """
    if model.endswith("medium"):
        return 384**2 * 1536 * 2
    return 192**2 * 2432 * 2 if model.endswith("large") else 0


@pytest.mark.parametrize(
    ("name", "traced"), [parameter(name, name, row) for name, row in IMAGE_MODELS.items()]
)
def test_the_estimate_for_each_image_model_is_within_15_percent(name, traced):
    model, weights = name.rsplit(", ", 1)
    estimate = step_memory(model, weights, "--gradient_checkpointing")
    # Weights are known exactly; only activations are estimated.
    assert estimate["encoders"] == pytest.approx(traced["encoders"], rel=0.01)
    estimated_bytes = {"lora": estimate["lora"], "bilora": estimate["bilora"]}
    if "lora_without_checkpointing" in traced:
        estimated_bytes["lora_without_checkpointing"] = step_memory(model, weights)["lora"]
    for variant, size in estimated_bytes.items():
        assert size == pytest.approx(traced[variant] - wrong_bytes(model), rel=0.15), variant


def text_task(case, folder):
    """Return a stand-in for a text task with all that a dry run reads; its rows have one length."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    options = {
        "model_name_or_path": "smollm2",
        "train_file": rows,
        "dry_run": True,
        "output_dir": folder / "run",
        "method": "lora",
        "rank": 8,
        "train_batch_size": case["rows"],
        "mixed_precision": case["mixed_precision"],
        "gradient_checkpointing": case["gradient_checkpointing"] or None,
    }
    cfg = resolve_text(words(options))
    config_class, config_values = case["config"]
    config = getattr(transformers, config_class)(**config_values)
    dtype = torch.float32 if case["mixed_precision"] == "no" else torch.bfloat16
    model = empty(lambda: getattr(transformers, case["class"])(config), dtype)
    saved = ("classifier",) if case["kind"] == "classification" else ()
    train = SimpleNamespace(lengths=[case["tokens"]], target_tokens=[case["targets"]])
    return SimpleNamespace(
        cfg=cfg,
        text_model=SimpleNamespace(model=model, kind=case["kind"], whole_modules=saved),
        data=SimpleNamespace(train=train),
        targets=lambda: [Target("model", model, AdapterSpec(8, 16, modules_to_save=saved), 1e-4)],
    )


@pytest.mark.parametrize(
    "case", [parameter(TEXT_CASE.format(**case), case) for case in read_table("text.json")]
)
def test_the_estimate_for_each_text_model_is_within_15_percent(case, tmp_path):
    task = text_task(case, tmp_path)
    step_bytes = memory_by_phase(task, None)[STEP]
    _, adapter_bytes = attach_copy(task, 1)
    estimate = sum(step_bytes.values()) + sum(adapter_bytes.values())
    assert estimate == pytest.approx(case["lora"], rel=0.15)
