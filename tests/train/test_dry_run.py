"""The memory that a dry run says, against what a tracer of every tensor found (commit 48c0e54)."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.methods import Target
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.task import memory_by_phase
from bilora_diffusion.train.dry_run import STEP, attached, empty
from docs.memory import FOLDER, step_memory

pytestmark = pytest.mark.usefixtures("hub")

TABLE = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
TEXT = {
    "{model} {rows}x{tokens} {mixed_precision} {gradient_checkpointing}".format(**case): case
    for case in json.loads((FOLDER / "text.json").read_text(encoding="utf-8"))
}
POSITIONS = {"medium": 384**2 * 1536 * 2, "large": 192**2 * 2432 * 2}
"""Bytes that the tracer counted too many: it took SD3's table of positions, which is bf16 in a run,
for fp32.
"""
SLOW = ("Stable", "FLUX", "Z-Image", "Qwen-Image", "Krea", "Llama")


def cases_of(table):
    """The rows by these names, of which the large models' are slow."""
    marks = [[pytest.mark.slow] * name.startswith(SLOW) for name in table]
    cases = table.values() if table is TEXT else table
    return [
        pytest.param(case, marks=m, id=n) for case, m, n in zip(cases, marks, table, strict=True)
    ]


@pytest.mark.parametrize("name", cases_of(TABLE))
def test_each_image_model_is_within_15_percent(name):
    model, weights = name.rsplit(", ", 1)
    over = next((size for kind, size in POSITIONS.items() if model.endswith(kind)), 0)
    expected = TABLE[name]
    estimate = step_memory(model, weights, "--gradient_checkpointing")
    assert estimate["encoders"] == pytest.approx(expected["encoders"], rel=0.01)
    for method in ("lora", "bilora"):
        assert estimate[method] == pytest.approx(expected[method] - over, rel=0.15), method
    if size := expected.get("lora_without_checkpointing"):
        assert step_memory(model, weights)["lora"] == pytest.approx(size - over, rel=0.15)


def text_task(case, folder):
    """What a dry run looks at of a task, with rows of one length."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    words = ["--model_name_or_path", "smollm2", "--train_file", str(rows), "--dry_run"]
    words += ["--output_dir", str(folder / "run"), "--method", "lora", "--rank", "8"]
    words += ["--train_batch_size", str(case["rows"]), "--mixed_precision", case["mixed_precision"]]
    cfg = resolve_text([*words, *["--gradient_checkpointing"] * case["gradient_checkpointing"]])
    config = getattr(transformers, case["config"][0])(**case["config"][1])
    dtype = torch.float32 if case["mixed_precision"] == "no" else torch.bfloat16
    model = empty(lambda: getattr(transformers, case["class"])(config), dtype)
    saved = ("classifier",) if case["kind"] == "classification" else ()
    train = SimpleNamespace(lengths=[case["tokens"]], target_tokens=[case["targets"]])
    return SimpleNamespace(
        cfg=cfg,
        loaded=SimpleNamespace(model=model, kind=case["kind"], whole_modules=saved),
        data=SimpleNamespace(train=train),
        sample_names=[""],
        targets=lambda: [Target("model", model, AdapterSpec(8, 16, modules_to_save=saved), 1e-4)],
    )


@pytest.mark.parametrize("case", cases_of(TEXT))
def test_each_text_model_is_within_15_percent(case, tmp_path):
    task = text_task(case, tmp_path)
    step = memory_by_phase(task, None)[STEP]
    estimate = sum(step.values()) + sum(attached(task, 1)[1].values())
    assert estimate == pytest.approx(case["lora"], rel=0.15)
