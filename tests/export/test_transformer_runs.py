"""Runs on a transformer: their files, checkpoints, and what evaluation and viewer make of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bilora_diffusion.errors import UserError
from bilora_diffusion.export import FILE_NAME, inspect, main
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.run.folder import clear, refuse_foreign_models
from eval.load import applied
from tests.export.mini_loras import one
from tests.export.test_transformers import SD3, output
from tests.image.tiny import shared
from tests.scripts.runs import copied, flags, train_once

RUNS: dict[str, dict[str, Any]] = {"lora": {"checkpointing_steps": 1}, "whole": {"method": "full"}}


def run(name: str) -> Path:
    """Of Bi-LoRA, or of full fine-tuning; shared."""
    base = {"pretrained_model_name_or_path": shared(SD3), "resolution": 64}
    return train_once(name, **base, **RUNS[name])


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(str(shared(SD3)), dtype=torch.float32)


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
    left, right = load_file(made), load_file(folder / FILE_NAME)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert main([str(folder), "--step", "2", "--to", "kohya"]) == 2


def test_kohyas_format_is_off_and_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    values = {"pretrained_model_name_or_path": shared(SD3), "resolution": 64}
    assert resolve(flags(tmp_path, **values)).output_kohya_format is False
    with pytest.raises(UserError, match="StableDiffusion3Pipeline is refused"):
        resolve(flags(tmp_path, **values, output_kohya_format=True))


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_the_weights_act_within_the_context_and_the_base_is_as_before(
    name: str, pipeline: Any
) -> None:
    before, own = output(pipeline), pipeline.transformer
    state = {key: value.clone() for key, value in own.state_dict().items()}
    subject = one(run(name))
    assert len(subject.digest) == 64
    with applied(pipeline, subject):
        inside = output(pipeline)
        assert not torch.equal(inside, before)
        assert not any(p.requires_grad for p in pipeline.transformer.parameters())
    if name == "lora":
        other = load_pipeline(str(shared(SD3)), dtype=torch.float32)
        other.load_lora_weights(run(name), weight_name=FILE_NAME)
        assert torch.equal(output(other), inside)
        with applied(pipeline, one(run(name) / FILE_NAME), 0.0):
            assert torch.equal(output(pipeline), before)
    assert pipeline.transformer is own
    assert _equal(own.state_dict(), state)
    assert torch.equal(output(pipeline), before)


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("name", "word"), [("lora", "can't be loaded"), ("whole", "has no")])
def test_another_kind_of_base_model_is_refused(name: str, word: str) -> None:
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
