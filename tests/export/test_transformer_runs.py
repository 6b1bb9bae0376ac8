"""Runs on a transformer: their files, checkpoints, and what evaluation and viewer make of them."""

from __future__ import annotations

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
from tests.image.tiny import saved
from tests.scripts.runs import flags, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, and two runs on it: of Bi-LoRA and of full fine-tuning."""
    root = tmp_path_factory.mktemp("transformers")
    model = saved(SD3, root / "base")
    shared = {"pretrained_model_name_or_path": model, "resolution": 64}
    train(root / "lora", **shared, checkpointing_steps=1)
    train(root / "whole", **shared, method="full")
    return root


@pytest.fixture(scope="module")
def pipeline(root: Path) -> Any:
    return load_pipeline(str(root / "base"), dtype=torch.float32)


def test_a_run_leaves_diffusers_file_alone_and_its_checkpoints_the_same(root: Path) -> None:
    folder = root / "lora"
    assert not list(folder.glob("lora*.safetensors"))  # kohya's would be named after the run
    contents = inspect(folder / FILE_NAME)
    assert set(contents.layers) == {"transformer"}
    assert contents.metadata["modelspec.title"] == "lora"
    assert main([str(folder), "--step", "2"]) == 0
    (made,) = (folder / "exports" / "step-2").iterdir()
    left, right = load_file(made), load_file(folder / FILE_NAME)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert main([str(folder), "--step", "2", "--to", "kohya"]) == 2


def test_kohyas_format_is_off_and_refused_where_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    values = {"pretrained_model_name_or_path": root / "base", "resolution": 64}
    assert resolve(flags(tmp_path, **values)).output_kohya_format is False
    with pytest.raises(UserError, match="StableDiffusion3Pipeline is refused"):
        resolve(flags(tmp_path, **values, output_kohya_format=True))


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_the_weights_act_within_the_context_and_the_base_is_as_before(
    name: str, root: Path, pipeline: Any
) -> None:
    before, own = output(pipeline), pipeline.transformer
    state = {key: value.clone() for key, value in own.state_dict().items()}
    subject = one(root / name)
    assert len(subject.digest) == 64
    with applied(pipeline, subject):
        inside = output(pipeline)
        assert not torch.equal(inside, before)
        assert not any(p.requires_grad for p in pipeline.transformer.parameters())
    if name == "lora":
        other = load_pipeline(str(root / "base"), dtype=torch.float32)
        other.load_lora_weights(root / name, weight_name=FILE_NAME)
        assert torch.equal(output(other), inside)
        with applied(pipeline, one(root / name / FILE_NAME), 0.0):
            assert torch.equal(output(pipeline), before)
    assert pipeline.transformer is own
    assert _equal(own.state_dict(), state)
    assert torch.equal(output(pipeline), before)


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("name", "word"), [("lora", "can't be loaded"), ("whole", "has no")])
def test_another_kind_of_base_model_is_refused(name: str, word: str, root: Path) -> None:
    mini = load_pipeline("mini", dtype=torch.float32)
    with pytest.raises(UserError, match=word), applied(mini, one(root / name)):
        pass


def test_a_fresh_start_deletes_a_runs_own_transformer_only(root: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="not of a run of full fine-tuning"):
        refuse_foreign_models(tmp_path)
    (tmp_path / "run.json").write_text((root / "whole" / "run.json").read_text())
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
