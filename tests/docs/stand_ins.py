"""Replacements for large models, long runs and the hub when a page's commands run in a test.

- A sweep does not train: each run gets a record of its configuration and a short run's weights.
- The harness's tasks have no rows: they give every model the same score.
- Steps are timed on a narrow model, losses of images are measured at one noise level, and the demo
  samples two icons.
"""

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion import demo
from bilora_diffusion.image import loss
from bilora_diffusion.image.config import resolve
from bilora_diffusion.text.config import TextConfig
from eval.landscape import points
from eval.sweep import plan, runs
from eval.text_scores import harness
from eval.text_scores.benchmarks import Item, Measurement
from tests.docs.pages import TEXT_SCRIPT, load_program
from tests.eval.clip_models import save_blip, save_open_clip
from tests.eval.text_score_models import judge
from tests.run import recorded_runs
from tests.scripts.runs import train_once
from tests.text.text_builders import ADAPTER, material, save_llama, train_text_once, write_rows

IMAGE_LORA = "pytorch_lora_weights.safetensors"
# Sizes of a Llama with two narrow layers
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
# Step -> training and held-out loss of a recorded run
LOSSES = {0: (2.0, 2.0), 1: (1.5, 1.6), 2: (1.0, 1.4)}
# Further held-out metrics of a recorded run's last step
SCORES = {
    "heldout_accuracy": 0.5,
    "heldout_matthews_correlation": 0.25,
    "heldout_answer_match": 0.5,
    "heldout_loss_by_level/725": 1.0,
}


class RecordedRun:
    """Run of a sweep that ends immediately: it writes a record and copies another run's weights."""

    def __init__(self, runner: runs.Runner, run: plan.Run, slot: int) -> None:
        self.run, self.slot, self.popen = run, slot, None
        self.folder = runner.runs_dir / run.name
        command = runner.command(run)
        argv = command[command.index(str(runner.script)) + 1 :]
        if runner.script.name == TEXT_SCRIPT:
            self.record_text(argv)
        else:
            self.record(argv, {})
            source = train_once("lora", method="lora")
            shutil.copy(source / IMAGE_LORA, self.folder)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": max(LOSSES), **SCORES}) + "\n")

    def record_text(self, argv: list[str]) -> None:
        """Write the record of a text run of any task, with the weights of a tiny causal model."""
        base = str(material("causal")["model_name_or_path"])
        changes = {"model_name_or_path": base, "task_type": "causal"}
        method = self.record(argv, changes, TextConfig.resolve)
        if method == "full":
            source = train_text_once("causal", "full", method="full")
            shutil.copytree(source / "model", self.folder / "model")
        else:
            source = train_text_once("causal", "lora", method="lora")
            for name in (ADAPTER, "adapter_config.json"):
                shutil.copy(source / name, self.folder)

    def record(self, argv: list[str], changes: dict[str, Any], read: Any = resolve) -> str:
        """Write the record, metrics and snapshots, and return the method."""
        config = read(argv)
        options = config.to_dict() | changes
        recorded_runs.make(
            self.folder, config.method, self.run.seed, tuple(LOSSES), options, losses=LOSSES
        )
        return config.method

    def is_running(self) -> bool:
        return False

    def outcome(self) -> runs.Outcome:
        return runs.Outcome(self.run.name, self.run.variant, self.run.seed, runs.FINISHED)


def measure_two_items(self: harness.Harness, *_: Any) -> Measurement:
    """Return a score of two items instead of a task's score."""
    return Measurement(0.5, [Item("0", 1.0), Item("1", 0.0)])


@contextmanager
def stand_ins(folder: Path) -> Iterator[dict[str, str]]:
    """Install all replacements, and yield the values of the names in braces in commands."""
    with pytest.MonkeyPatch.context() as patch, judge("[[8]]") as endpoint:
        patch.setattr(runs, "RunProcess", RecordedRun)
        patch.setattr(runs, "_end", lambda _: None)
        patch.setattr(loss, "NOISE_LEVELS", 1)
        patch.setattr(points, "NOISE_LEVELS", 1)
        patch.setattr(demo, "ICON_COUNT", 2)
        patch.setattr(demo, "COMPARED_COUNT", 1)
        patch.setattr(demo, "SAMPLER_STEPS", 1)
        manager = SimpleNamespace(all_tasks=[], all_tags=[])
        patch.setattr(harness, "task_manager", lambda *_: manager)
        patch.setattr(harness.Harness, "measure", measure_two_items)
        step_cost = load_program("benchmarks/step_cost.py")
        narrow = partial(importlib.import_module("random_models").llama_7b, **NARROW)
        workload = replace(step_cost.WORKLOADS["llama-7b-layer"], build=narrow, steps=1)
        for name in step_cost.WORKLOADS:
            patch.setitem(step_cost.WORKLOADS, name, workload)
        patch.setattr(step_cost, "memory_of", lambda *_: 0)

        question = {"question_id": 1, "category": "math", "turns": ["What is 2 + 3?"]}
        space = folder / "space.yaml"
        space.write_text("learning_rate: [1.0e-3, 2.0e-3]\n")
        t5 = material("seq2seq")
        yield {
            "space": str(space),
            "t5": str(t5["model_name_or_path"]),
            "t5_rows": str(t5["train_file"]),
            "llama": str(save_llama(folder / "llama", chat=True)),
            "clip": f"open_clip:{save_open_clip(folder / 'clip')}",
            "blip": f"blip:{save_blip(folder / 'blip')}",
            "captioner": str(folder / "blip"),
            "questions": str(write_rows(folder / "questions.jsonl", [question])),
            "judge": endpoint.url,
        }
