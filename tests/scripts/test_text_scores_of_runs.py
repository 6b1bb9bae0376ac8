"""``python -m eval.text_scores`` on run folders as training itself leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eval import text_scores
from eval.text import harness
from eval.text.schema import TextScores
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


def score(folder: Path, *words: str | Path) -> dict[str, dict[str, Any]]:
    """Row -> benchmark -> (effect of the adapter, what was answered to each item)."""
    where = ["--include_path", str(save_tasks(folder / "tasks")), "--output_dir", str(folder / "o")]
    what = ["--benchmarks", "toy_choice,toy_text"]
    assert text_scores.main(["base", *map(str, words), *what, *where]) == 0
    found = TextScores.read(folder / "o")
    rows: dict[str, dict[str, Any]] = {run.name: {} for run in found.runs}
    for one in found.scores:
        about = (one.measured.details["effect_of_adapter"], one.measured.items)
        rows[found.runs[one.run].name][found.benchmarks[one.benchmark].name] = about
    return rows


def effects(row: dict[str, Any]) -> list[float | None]:
    return [effect for effect, _ in row.values()]


def items(row: dict[str, Any]) -> dict[str, Any]:
    return {name: answered for name, (_, answered) in row.items()}


def test_a_causal_model_with_an_adapter_and_trained_whole(tmp_path: Path) -> None:
    bilora = train(tmp_path, "causal", "bilora", template="plain")
    full = train(tmp_path, "causal", "full", template="plain")
    found = score(tmp_path, bilora, full, zero_of(bilora, tmp_path / "zero"))
    assert all(effects(found["bilora"]))
    assert effects(found["zero"]) == [0, 0]
    assert effects(found["full"]) == effects(found["base"]) == [None, None]
    assert items(found["zero"]) == items(found["base"])
    texts = [items(found[name])["toy_text"] for name in ("base", "bilora", "full")]
    assert texts[1] != texts[0]  # both runs answer as what was trained, and not as the base model
    assert texts[2] != texts[0]


def test_a_seq2seq_model_is_asked_without_a_template_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(harness, "context_text", lambda *given: asked.append(given) or "")
    bilora = train(tmp_path, "seq2seq", "bilora")
    found = score(tmp_path, bilora, zero_of(bilora, tmp_path / "zero"), "--template", "run")
    assert not asked
    assert all(effects(found["bilora"]))
    assert effects(found["zero"]) == [0, 0]
    assert effects(found["base"]) == [None, None]
    assert items(found["zero"]) == items(found["base"])
