"""Every method on every kind of text model: trains, resumes exactly, exports the primary alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.methods import names
from bilora_diffusion.run import runlog
from tests.scripts.runs import column
from tests.text.text_builders import (
    KINDS,
    SAVERS,
    exported,
    heldout_of,
    rows_for,
    text_difference,
    train_text,
    write_rows,
)

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("causal", {"init_lora_weights": "pissa"}),
    (
        "classification",
        {"init_lora_weights": "pissa", "use_dora": True, "use_ema": True, "ema_decay": 0.5},
    ),
    ("seq2seq", {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}),
    ("causal", {"use_ema": True, "ema_decay": 0.5}),
    ("causal", {"use_dora": True, "lora_dropout": 0.1}),
    ("causal", {"mixed_precision": "bf16"}),
    ("classification", {"mixed_precision": "bf16"}),
    ("seq2seq", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    ("causal", {"packing": True}),
    ("causal", {"packing": True, "mixed_precision": "bf16"}),
    ("seq2seq", {"group_by_length": True}),
    ("causal", {"method": "full", "mixed_precision": "bf16"}),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By kind: what a run is given."""
    folder = tmp_path_factory.mktemp("text")
    return {
        kind: {
            "model_name_or_path": SAVERS[kind](folder / kind),
            "train_file": write_rows(folder / f"{kind}.jsonl", rows_for(kind, 24)),
            "validation_file": write_rows(folder / f"{kind}-held.jsonl", rows_for(kind, 7, 24)),
            "template": "plain",
            "max_predictions": 0,
            "checkpointing_steps": 1,
            "train_batch_size": 4,
            "rho": 0.5,  # large, so that an auxiliary that acts in an evaluation is seen
        }
        for kind in KINDS
    }


def check_run(folder: Path, given: dict[str, Any]) -> None:
    """It resumes bit for bit from its first step, and its file is what was measured."""
    parts = folder.parent / "parts"
    shutil.copytree(folder, parts)
    first = parts / "checkpoints" / "step-1"
    train_text(parts, **given, resume_from_checkpoint=first)
    assert text_difference(folder, parts) == 0
    for key in ("loss", "digest", "grad_norm", "heldout_loss"):
        assert column(folder, key) == column(parts, key)
    record = runlog.read_run(folder)
    assert record["status"] == "finished"
    assert not [key for key in exported(folder) if "auxiliary" in key or "initial" in key]
    measured = heldout_of(given["model_name_or_path"], folder)
    assert measured["heldout_loss"] == pytest.approx(column(folder, "heldout_loss")[-1], abs=1e-6)
    stored = {key: value for key, value in record["results"].items() if key in measured}
    assert stored == pytest.approx(measured, abs=1e-6)
    start, end = column(folder, "heldout_loss")
    assert abs(start - end) > 1e-4  # else the comparison above proves nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", names())
def test_every_method(material: Any, tmp_path: Path, kind: str, method: str) -> None:
    given = {**material[kind], "method": method}
    check_run(train_text(tmp_path / "run", **given), given)


@pytest.mark.parametrize(
    ("kind", "values"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_options(material: Any, tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    given = {**material[kind], **values}
    check_run(train_text(tmp_path / "run", **given), given)


def test_four_bit_weights(material: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    for kind in ("causal", "classification"):
        given = {**material[kind], "quantize": "nf4"}
        folder = train_text(tmp_path / kind / "run", **given)
        parts = train_text(tmp_path / kind / "parts", **given)
        train_text(parts, **given, resume_from_checkpoint=parts / "checkpoints" / "step-1")
        assert text_difference(folder, parts) == 0
        plain = train_text(tmp_path / kind / "plain", **{**given, "quantize": "none"})
        losses = [column(run, "loss") for run in (folder, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != losses[1]
        assert exported(folder).keys() == exported(plain).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_micro_batches_changes_nothing(
    material: Any, tmp_path: Path, kind: str
) -> None:
    runs = [
        train_text(
            tmp_path / f"{size}",
            **{**material[kind], "train_batch_size": size, "learning_rate": 1e-4},
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 4, 1)
    ]
    for run in runs[1:]:
        assert column(run, "digest") == column(runs[0], "digest")
        assert column(run, "loss") == pytest.approx(column(runs[0], "loss"), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_losses(
    material: Any, tmp_path: Path, kind: str
) -> None:
    plain = train_text(tmp_path / "plain", **material[kind])
    saving = train_text(tmp_path / "saving", **material[kind], gradient_checkpointing=True)
    assert column(saving, "loss") == pytest.approx(column(plain, "loss"), abs=1e-6)
    assert column(saving, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-5)


def test_all_methods_see_the_same(material: Any, tmp_path: Path) -> None:
    runs = [
        train_text(tmp_path / method, **material["classification"], method=method)
        for method in names()
    ]
    digests = [column(run, "digest") for run in runs]
    assert all(seen == digests[0] for seen in digests)
    first = {column(run, "loss")[0] for run in runs if run.name != "flat-lora"}
    assert max(first) - min(first) < 1e-6
