"""``python -m eval.text_scores`` on run folders as training itself leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eval import table, text_scores
from eval.text_scores import harness
from tests.eval.text_score_models import save_tasks
from tests.text.text_builders import ADAPTER, SAVERS, rows_for, train_text, write_rows

pytest.importorskip("lm_eval")


def train(folder: Path, kind: str, method: str, **values: Any) -> Path:
    """Two steps on a tiny model, at a rate that changes its answers."""
    base = folder / "base"
    if not base.exists():
        SAVERS[kind](base)
    rows = write_rows(folder / "rows.jsonl", rows_for(kind, 8))
    given = {"model_name_or_path": base, "train_file": rows, "learning_rate": 0.1}
    return train_text(folder / method, method=method, train_batch_size=4, **given, **values)


def zero_of(run: Path, folder: Path) -> Path:
    """The run's adapter, as a folder of its own that adds nothing."""
    folder.mkdir()
    shutil.copy(run / "adapter_config.json", folder)
    weights = load_file(run / ADAPTER)
    save_file({k: v * 0 if "lora_B" in k else v for k, v in weights.items()}, folder / ADAPTER)
    return folder


def score(folder: Path, *words: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """By subject: its effect on a probe, for those with an adapter; and what it answered."""
    where = ["--include_path", str(save_tasks(folder / "tasks")), "--output_dir", str(folder / "o")]
    what = ["--benchmarks", "toy_choice,toy_text"]
    assert text_scores.main(["base", *map(str, words), *what, *where]) == 0
    rows, answers = table.read(folder / "o").rows, {}
    for row in rows:
        if row.item:
            answers.setdefault(row.subject, {})[row.item] = row.note
    effect = "toy_text effect of adapter"
    return {row.subject: row.value for row in rows if row.metric == effect}, answers


def test_a_causal_model_with_an_adapter_and_trained_whole(tmp_path: Path) -> None:
    bilora = train(tmp_path, "causal", "bilora", template="plain")
    full = train(tmp_path, "causal", "full", template="plain")
    effects, found = score(tmp_path, bilora, full, zero_of(bilora, tmp_path / "zero"))
    assert effects.pop("bilora") > 0
    assert effects == {"zero": 0}
    assert found["zero"] == found["base"]
    assert found["bilora"] != found["base"]  # both runs answer as what was trained
    assert found["full"] not in (found["base"], found["bilora"])


def test_a_seq2seq_model_is_asked_without_a_template_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "context_text", lambda *_: pytest.fail("a template was used"))
    bilora = train(tmp_path, "seq2seq", "bilora")
    effects, found = score(
        tmp_path, bilora, zero_of(bilora, tmp_path / "zero"), "--template", "run"
    )
    assert effects.pop("bilora") > 0
    assert effects == {"zero": 0}
    assert found["zero"] == found["base"]
