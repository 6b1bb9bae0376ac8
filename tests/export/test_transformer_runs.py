"""Runs on a transformer: their files, checkpoints, and what evaluation and viewer make of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.export import FILE_NAME, inspect, main
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.run.folder import clear, refuse_foreign_models
from eval.load import applied
from tests.export.export_models import equal
from tests.export.mini_loras import one
from tests.export.test_transformers import SD3, output
from tests.image.tiny import shared
from tests.scripts.runs import copied, train_once

RUNS: dict[str, dict[str, Any]] = {"lora": {"checkpointing_steps": 1}, "whole": {"method": "full"}}


def run(name: str) -> Path:
    """Of Bi-LoRA, or of full fine-tuning; shared."""
    base = {"pretrained_model_name_or_path": shared(SD3), "resolution": 64}
    return train_once(name, **base, **RUNS[name])


def test_a_run_leaves_diffusers_file_alone_and_its_checkpoints_the_same(
    tmp_path: Path,
) -> None:
    folder = copied(run("lora"), tmp_path / "lora")
    assert not list(folder.glob("lora*.safetensors"))  # kohya's would be named after the run
    workflow = (folder / "lora.comfy.json").read_text(encoding="utf-8")
    assert {"base.safetensors", "lora.safetensors"} <= {*re.findall(r'"([\w.]+)"', workflow)}
    assert "`lora.comfy.json`" in (folder / "README.md").read_text(encoding="utf-8")
    assert not list(run("whole").glob("*.comfy.json"))
    contents = inspect(folder / FILE_NAME)
    assert set(contents.layers) == {"transformer"}
    assert contents.metadata["modelspec.title"] == "lora"
    assert main([str(folder), "--step", "2"]) == 0
    (made,) = (folder / "exports" / "step-2").iterdir()
    assert equal(made, folder / FILE_NAME)
    assert main([str(folder), "--step", "2", "--to", "kohya"]) == 2


@pytest.mark.parametrize(("name", "word"), [("lora", "can't be loaded"), ("whole", "has no")])
def test_the_weights_act_within_the_context_and_on_no_other_kind_of_model(
    name: str, word: str
) -> None:
    pipeline = load_pipeline(str(shared(SD3)), dtype=torch.float32)
    before, own = output(pipeline), pipeline.transformer
    with applied(pipeline, one(run(name))):
        inside = output(pipeline)
        assert not torch.equal(inside, before)
    assert pipeline.transformer is own
    assert torch.equal(output(pipeline), before)
    if name == "lora":
        pipeline.load_lora_weights(run(name), weight_name=FILE_NAME)
        assert torch.equal(output(pipeline), inside)
    mini = load_pipeline("mini", dtype=torch.float32)
    with pytest.raises(UserError, match=word), applied(mini, one(run(name))):
        pass


def test_a_fresh_start_deletes_a_runs_own_transformer_only(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="not of a run of full fine-tuning"):
        refuse_foreign_models(tmp_path)
    (tmp_path / "run.json").write_text((run("whole") / "run.json").read_text())
    (tmp_path / f"{tmp_path.name}.comfy.json").touch()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
