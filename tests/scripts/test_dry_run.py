"""``--dry_run`` as a user runs it: every kind of model, without weights, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub.utils import filter_repo_objects
from torch import nn

import train_dreambooth_bilora
import train_text_bilora
from bilora_diffusion.image import pipeline
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.mini import pipeline_dir
from tests.image.tiny import FILES, saved
from tests.scripts.runs import flags
from tests.text.text_builders import KINDS, material, text_flags

SD3 = "StableDiffusion3Pipeline"


def without_weights(folder: Path) -> Path:
    """The folder of a model whose weights are gone."""
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def image_run(capsys: Any, folder: Path, code: int = 0, **values: Any) -> str:
    """What a dry run of images says; it writes nothing."""
    AcceleratorState._reset_state()
    argv = [*flags(folder, **values), "--dry_run"]
    assert train_dreambooth_bilora.main(argv) == code
    assert not folder.exists()
    return "".join(capsys.readouterr())


@pytest.mark.slow
def test_the_miniature_runs_dry(capsys: Any, tmp_path: Path) -> None:
    base = without_weights(shutil.copytree(pipeline_dir(), tmp_path / "mini"))
    values = {"pretrained_model_name_or_path": base, "validation_dataset": "mini-heldout"}
    drawn = {"validation_prompt": "an icon", "num_validation_images": 1}
    said = image_run(capsys, tmp_path / "run", **values, **drawn)
    for words in (
        "UNet2DConditionModel",
        "adapted layers: 56",
        "primary 89,600, auxiliary 89,600",
        "23 images at 64 px",
        "steps: 2 of",
        "weights: unet, fp32",
        "activations kept for backward",
        "the optimizer's state",
        "the process itself",
        "held-out loss",
        "validation images",
        "It fits",
    ):
        assert words in said


@pytest.mark.slow
def test_layers_and_parameters_of_convolutions_are_counted(capsys: Any, tmp_path: Path) -> None:
    said = image_run(capsys, tmp_path / "run", lora_layers="convolutions", rank=2)
    unet = load_pipeline("mini", dtype=torch.float32).unet
    found = [
        module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d) and name not in ("conv_in", "conv_out")
    ]
    count = sum(
        2 * (c.in_channels * c.kernel_size[0] * c.kernel_size[1] + c.out_channels) for c in found
    )
    assert f"adapted layers: {len(found)}" in said
    assert f"primary {count:,}," in said


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != SD3)) for kind in FILES]
)
def test_each_family_runs_dry_without_weights(kind: str, capsys: Any, tmp_path: Path) -> None:
    base = without_weights(saved(kind, tmp_path / "base"))
    values = {
        "pretrained_model_name_or_path": base,
        "resolution": 64,
        "validation_dataset": "mini-heldout",
        "validation_prompt": "an icon",
        "num_validation_images": 1,
    }
    said = image_run(capsys, tmp_path / "run", **values)
    assert "weights: transformer, fp32" in said
    assert "embedding the prompts" in said
    assert "It fits" in said


def test_of_a_model_on_the_hub_no_weights_are_downloaded(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, here = saved(SD3, tmp_path / "whole"), tmp_path / "here"

    def download(name: str, allow_patterns: list[str], **_: Any) -> str:
        assert name == "somebody/sd3"
        names = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / file, here / file)
        return str(here)

    monkeypatch.setattr(pipeline, "snapshot_download", download)
    monkeypatch.setattr(pipeline, "hf_hub_download", lambda *_, **__: whole / "model_index.json")
    values = {"pretrained_model_name_or_path": "somebody/sd3", "resolution": 64}
    assert "It fits" in image_run(capsys, tmp_path / "run", **values)
    assert not list(here.rglob("*.safetensors"))
    assert list(here.rglob("tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_text_model_runs_dry(kind: str, capsys: Any, tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    given = material(tmp_path, kind)
    without_weights(Path(given["model_name_or_path"]))
    given["validation_file"] = given["train_file"]
    argv = [*text_flags(tmp_path / "run", **given), "--dry_run"]
    assert train_text_bilora.main(argv) == 0
    said = "".join(capsys.readouterr())
    assert "24 rows" in said
    assert "weights: model, fp32" in said
    assert ("trained whole" in said) == (kind == "classification")
    assert ("answers" in said) == (kind != "classification")
    assert "It fits" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_bits_are_counted_as_stored(capsys: Any, tmp_path: Path) -> None:
    base = without_weights(saved(SD3, tmp_path / "base"))
    values = {"pretrained_model_name_or_path": base, "resolution": 64, "quantize": "nf4"}
    assert "weights: transformer, 4 bits" in image_run(capsys, tmp_path / "run", **values)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"resolution": 72}, "64"), ({"lora_layers": "to_z"}, "to_z"), ({"rank": 0}, "--rank is 0")],
    ids=str,
)
def test_bad_input_is_one_sentence(
    values: dict[str, Any], said: str, capsys: Any, tmp_path: Path
) -> None:
    base = without_weights(saved(SD3, tmp_path / "base"))
    shared = {"pretrained_model_name_or_path": base, "resolution": 64, **values}
    assert said in image_run(capsys, tmp_path / "run", code=2, **shared)
