"""The text task: its loss is Transformers' token mean, however a step is cut; and its measures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.encode import Encoded
from bilora_diffusion.text.models import load_text_model
from bilora_diffusion.text.module import collate
from bilora_diffusion.text.rows import encode_rows, open_rows
from bilora_diffusion.text.task import TextTask
from tests.text.text_builders import (
    KINDS,
    SAVERS,
    rows_for,
    save_gpt2,
    text_flags,
    write_rows,
)


def task_of(folder: Path, kind: str, base: Path | None = None, **values: Any) -> TextTask:
    """A task on 24 rows with 7 held-out ones."""
    base = base or SAVERS[kind](folder / "base")
    train = write_rows(folder / "train.jsonl", rows_for(kind, 24))
    held = write_rows(folder / "held.jsonl", rows_for(kind, 7, first=24))
    given = {"train_file": train, "validation_file": held, "template": "plain", **values}
    cfg = resolve_text(
        text_flags(
            folder / "run", model_name_or_path=base, task_type=kind, cache_dir=folder, **given
        )
    )
    rows = open_rows(cfg)
    labels = rows.label_words if kind == "classification" else None
    loaded = load_text_model(str(base), kind, labels=labels)
    return TextTask(cfg, loaded, encode_rows(cfg, rows, loaded))


def step_losses(task: TextTask, size: int, pieces: int) -> torch.Tensor:
    """The losses of the slots of the first step of ``size`` samples, cut into ``pieces``."""
    slots = torch.arange(size).chunk(pieces)
    schedule = [(0, tuple(part.tolist())) for part in slots]
    with torch.no_grad():
        return torch.cat([task.module(b.inputs) for b in task.micro_batches(schedule, size)])


def their_loss(task: TextTask, rows: Encoded, count: int) -> float:
    """The loss that Transformers' model gives the first rows as one batch."""
    batch = collate([rows.row(i) for i in range(count)], task.loaded.kind, 0)
    with torch.no_grad():
        return float(task.loaded.model(**batch).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_measures_are_transformers_however_they_are_cut(
    tmp_path: Path, kind: str
) -> None:
    task = task_of(tmp_path, kind, eval_train_samples=5)
    (batch,) = task.micro_batches([(0, tuple(range(8)))], 8)
    given = {name: value for name, value in batch.inputs.items() if name != "weights"}
    with torch.no_grad():
        loss = task.loaded.model(**given).loss
    whole = step_losses(task, 8, 1)
    assert float(whole.mean()) == pytest.approx(float(loss), abs=1e-6)
    for pieces in (2, 4, 8):
        torch.testing.assert_close(step_losses(task, 8, pieces), whole, atol=1e-6, rtol=0)
    if kind != "classification":  # the targets are of different lengths, so a mean of means is not
        assert len({task.data.train.target_tokens[i] for i in range(8)}) > 1
    evaluation = task.evaluation
    assert evaluation is not None
    measured = evaluation.measure()
    theirs = their_loss(task, evaluation.rows, 7)
    assert measured["heldout_loss"] == pytest.approx(theirs, abs=1e-6)
    theirs = their_loss(task, task.data.train, 5)
    assert measured["train_grid_loss"] == pytest.approx(theirs, abs=1e-6)
    evaluation.cfg = dataclasses.replace(task.cfg, eval_batch_size=1)
    assert evaluation.measure() == pytest.approx(measured, abs=1e-6)


def test_the_digest_knows_the_rows_and_not_the_cut(tmp_path: Path) -> None:
    task = task_of(tmp_path, "causal", validation_file=None)
    (whole,) = task.micro_batches([(0, (0, 1, 2, 3))], 4)
    parts = list(task.micro_batches([(0, (0, 1)), (0, (2, 3))], 4))
    assert whole.digests == parts[0].digests + parts[1].digests
    assert whole.names == parts[0].names + parts[1].names
    assert len(set(whole.digests)) == 4
    assert all(
        name.startswith("line ") and name.endswith(" of train.jsonl") for name in whole.names
    )
    nothing: Any = contextlib.nullcontext()  # is measured without held-out rows
    assert task.heldout_loss(nothing) == task.validate(1, tmp_path / "run", nothing) == {}
    assert not (tmp_path / "run").exists()


def test_group_by_length_brings_like_lengths_together(tmp_path: Path) -> None:
    plain = task_of(tmp_path, "causal")
    grouped = task_of(tmp_path, "causal", tmp_path / "base", group_by_length=True)

    def padding(task: TextTask) -> int:
        batches = task.micro_batches([(step, (0, 1, 2, 3)) for step in range(6)], 4)
        return sum(int((b.inputs["attention_mask"] == 0).sum()) for b in batches)

    assert padding(grouped) < padding(plain) / 2


def test_predictions_are_those_of_single_generation(tmp_path: Path) -> None:
    """Left padding must not change what a causal model answers."""
    task = task_of(tmp_path, "causal", generation_max_new_tokens=6)
    values = task.validate(3, tmp_path / "run", contextlib.nullcontext())
    file = tmp_path / "run" / "validation" / "step-3" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = rows_for("causal", 7, first=24)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    assert [line["reference"] for line in lines] == [row["answer"] for row in rows]
    hits = sum(line["prediction"] == line["reference"] for line in lines)
    assert values == {"heldout_exact_match": hits / 7}
    tokenizer, model = task.loaded.tokenizer, task.loaded.model
    for line in lines:
        ids = torch.tensor([tokenizer(line["prompt"] + "\n")["input_ids"]])
        made = model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert line["prediction"] == text.strip()


def test_prompts_and_answers_stay_within_learned_positions(tmp_path: Path) -> None:
    """GPT-2 has no position beyond its last; a long prompt is cut from the left, as in training."""
    base = save_gpt2(tmp_path / "base")
    long = [{"prompt": "say hello to me " * 40 + str(n), "answer": "one"} for n in range(3)]
    held = write_rows(tmp_path / "long.jsonl", long)
    task = task_of(tmp_path, "causal", base, validation_file=held)  # asks for 256 new tokens
    values = task.validate(1, tmp_path / "run", contextlib.nullcontext())
    assert values.keys() == {"heldout_exact_match"}
    with pytest.raises(UserError, match=r"--generation_max_new_tokens 64 .* give 32 or less"):
        task_of(tmp_path, "causal", base, generation_max_new_tokens=64)
