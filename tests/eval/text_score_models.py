"""A small language model, adapters on it, run folders and harness tasks, for tests of scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bilora_diffusion.run.runlog import RunLog
from tests.text.text_builders import save_llama

LETTERS = ("A", "B")
Rows = Sequence[tuple[int, dict[str, float]]]
ROWS: Rows = [(1, {"loss": 1.0}), (2, {"heldout_loss": 2.0, "heldout_accuracy": 0.5})]


def save_base(folder: Path) -> Path:
    """A random Llama of two layers, with its tokenizer and room for long prompts."""
    return save_llama(folder, max_position_embeddings=4096)


def save_adapter(base: Path, folder: Path, scale: float = 1.0, seed: int = 0) -> Path:
    """A LoRA adapter on the base model's attention; ``scale`` 0 makes one that does nothing."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(scale)
    model.save_pretrained(str(folder))
    return folder


def save_record(
    folder: Path, method: str = "lora", seed: int = 0, rows: Rows = ROWS, **config: Any
) -> Path:
    """A run folder without weights: ``run.json``, and ``metrics.jsonl`` of (step, figures)."""
    log = RunLog(folder)
    options = {"model_name_or_path": "owner/base", "task_type": "causal", "task": "cola"}
    own = {"method": method, "seed": seed}
    log.start(options | config | own, method=method, seed=seed, resume_step=None)
    for step, figures in rows:
        log.metric(step, **figures)
    log.finish()
    return folder


def save_run(
    base: Path,
    folder: Path,
    *,
    method: str = "lora",
    seed: int = 0,
    scale: float = 1.0,
    **more: Any,
) -> Path:
    """A run folder as training leaves it: adapter, record, recorded figures."""
    last = {"heldout_loss": 1.0 + seed / 10, "heldout_accuracy": 0.75 + seed / 100}
    rows = [(5, {"heldout_loss": 1.5, "heldout_accuracy": 0.5}), (10, last)]
    config = {"model_name_or_path": str(base), "task": "toy", "template": "plain", "rank": 2}
    save_record(folder, method, seed, rows, **config | more)
    save_adapter(base, folder, scale, seed=100 * seed + len(method))
    return folder


def save_tasks(folder: Path) -> Path:
    """Two local harness tasks of twelve items: ``toy_choice`` and ``toy_text``."""
    folder.mkdir()
    rows = [
        {"question": f"Letter number {n}?", "choices": LETTERS, "gold": n % 2, "answer": str(n)}
        for n in range(12)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n    train: {data}\n"
        "test_split: test\ntraining_split: train\n"
        'doc_to_text: "{{question}}"\n'
    )
    choice = (
        f"task: toy_choice\n{shared}output_type: multiple_choice\n"
        "doc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "metadata:\n  version: 1.0\n"
    )
    text = (
        f'task: toy_text\n{shared}output_type: generate_until\ndoc_to_target: "{{{{answer}}}}"\n'
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
        "filter_list:\n  - name: digits\n    filter:\n      - function: regex\n"
        "        regex_pattern: '(\\d+)'\n      - function: take_first\n"
        "metadata:\n  version: 1.0\n"
    )
    (folder / "toy_choice.yaml").write_text(choice, encoding="utf-8")
    (folder / "toy_text.yaml").write_text(text, encoding="utf-8")
    return folder
