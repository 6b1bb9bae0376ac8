"""The model card: front matter the hub reads, code that runs, and nothing of this machine."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bilora_diffusion.export import FILE_NAME, kohya_file_name, save_models
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run.card import write_card
from bilora_diffusion.run.publish import NOT_UPLOADED
from tests.export.mini_loras import write_lora

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def card(folder: Path, **values: Any) -> ModelCard:
    given: dict[str, Any] = {
        "base_model": SDXL,
        "method": "bilora",
        "dataset": "linoyts/3d_icon",
        "prompts": [],
        "images": [],
    }
    return ModelCard.load(write_card(folder, **{**given, **values}))


def code(text: str) -> str:
    """The Python block of a card; raises when it is not Python."""
    start = text.index("```python\n") + len("```python\n")
    block = text[start : text.index("\n```", start)]
    ast.parse(block)
    return block


def test_a_full_card(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    images = [tmp_path / "validation" / f"step 500-{i}.png" for i in range(2)]
    found = card(
        tmp_path,
        prompts=["a TOK icon of a frog: green", 'a "TOK" icon'],
        images=images,
        instance_prompt="a TOK icon, in the style of TOK",
        settings={"method": "bilora", "rank": 4, "alpha": 8.0, "rho": 0.05, "auxiliary rank": None},
        results={"held-out loss": 0.0812345678, "steps": 500},
        license="openrail++",
        vae="madebyollin/sdxl-vae-fp16-fix",
    )
    assert found.data.to_dict() == {
        "license": "openrail++",
        "library_name": "diffusers",
        "base_model": SDXL,
        "datasets": ["linoyts/3d_icon"],
        "tags": [
            "text-to-image",
            "diffusers",
            "lora",
            "template:sd-lora",
            "stable-diffusion-xl",
            "stable-diffusion-xl-diffusers",
            "bilora",
        ],
        "instance_prompt": "a TOK icon, in the style of TOK",
        "widget": [
            {
                "text": "a TOK icon of a frog: green",
                "output": {"url": "validation/step%20500-0.png"},
            },
            {"text": 'a "TOK" icon', "output": {"url": "validation/step%20500-1.png"}},
        ],
    }
    text = found.text
    assert "# stabilityai/stable-diffusion-xl-base-1.0 fine-tuned with Bi-LoRA" in text
    assert "holds the primary adapter alone" in text
    assert "Use `a TOK icon, in the style of TOK` in the prompt." in text
    rows = "| method | Bi-LoRA |\n| rank | 4 |\n| alpha | 8 |\n| rho | 0.05 |\n"
    assert rows in text
    assert "auxiliary rank" not in text
    assert "| held-out loss | 0.0812346 |\n| steps | 500 |" in text
    assert "![a TOK icon of a frog: green](validation/step%20500-0.png)" in text
    snippet = code(text)
    assert (
        'load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")'
        in snippet.replace("'", '"')
    )
    assert "AutoencoderKL.from_pretrained('madebyollin/sdxl-vae-fp16-fix'" in snippet
    assert "vae=vae" in snippet
    assert "image = pipeline('a TOK icon of a frog: green').images[0]" in snippet


def run(snippet: str, replaced: Mapping[str, str] | None = None) -> None:
    """Run a card's code on the miniature and the CPU, with two steps instead of fifty."""
    for old, new in {'"cuda"': '"cpu"', ").images": ", num_inference_steps=2).images"}.items():
        snippet = snippet.replace(old, new)
    for old, new in (replaced or {}).items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype.*")
        exec(snippet, {})  # the card's own code


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA for the miniature in both formats."""
    pipeline = DiffusionPipeline.from_pretrained(pipeline_dir(), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("icons")
    write_lora(folder, pipeline, components=("unet", "text_encoder"), kohya=True)
    return folder


def test_the_code_for_the_miniature_runs(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights)  # "this folder"
    run(code(card(tmp_path, base_model="mini", dataset="mini", instance_prompt="an icon").text))
    with Image.open(weights / "image.png") as image:
        assert image.size == (64, 64)
        assert np.asarray(image).std() > 1


@pytest.mark.parametrize("vae", [None, "madebyollin/sdxl-vae-fp16-fix"])
def test_the_code_for_sdxl_runs_in_its_precision(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vae: str | None
) -> None:
    monkeypatch.chdir(weights)
    (weights / "image.png").unlink(missing_ok=True)
    places = {SDXL: str(pipeline_dir())} | ({vae: str(pipeline_dir() / "vae")} if vae else {})
    snippet = code(card(tmp_path, vae=vae).text)
    assert snippet.count("dtype=torch.float16") == len(places)
    run(snippet, {repr(name): repr(new) for name, new in places.items()})
    with Image.open(weights / "image.png") as image:
        assert np.asarray(image).std() > 1  # neither black nor grey


def test_the_code_for_whole_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_dir(), dtype=torch.float32)
    parts = ("unet", "text_encoder")
    save_models(tmp_path, {name: getattr(pipeline, name) for name in parts})
    monkeypatch.chdir(tmp_path)
    run(code(card(tmp_path, base_model="mini", method="full", whole_models=parts).text))
    assert (tmp_path / "image.png").exists()


def test_the_upload_has_both_files_and_no_other_of_their_name(weights: Path) -> None:
    export = "exports/step-100/pytorch_lora_weights.safetensors"  # diffusers might take it instead
    files = [*(path.name for path in weights.glob("*.safetensors")), export, "checkpoints/a"]
    uploaded = set(filter_repo_objects(files, ignore_patterns=NOT_UPLOADED))
    assert uploaded == {FILE_NAME, kohya_file_name(weights)}


def test_where_to_put_which_file(tmp_path: Path) -> None:
    names: dict[str, Any] = {"kohya_name": "my icons.safetensors"}
    text = card(tmp_path, **names).text
    for said in ("`my icons.safetensors` into `models/loras`", "`<lora:my icons:1>`"):
        assert said in text
    assert "DoRA" not in text
    dora = card(tmp_path, **names, dora=True).text
    assert "0.3.30" in dora
    assert "A1111" in dora
    assert "--to kohya" in card(tmp_path).text  # where the run wrote none
    whole = card(tmp_path, method="full", whole_models=["unet"]).text
    assert "ComfyUI" not in whole
    mini = card(tmp_path, base_model="mini", **names).text
    assert "models/loras" not in mini  # nothing but this package knows the miniature


def test_only_what_is_given_is_said(tmp_path: Path) -> None:
    found = card(tmp_path, method="lora", dataset=None, repo_id="me/icons", weight_name="x.sft")
    assert set(found.data.to_dict()) == {"library_name", "base_model", "tags"}
    assert found.data.to_dict()["tags"].count("lora") == 1
    for heading in ("Trigger", "Results", "Images"):
        assert f"## {heading}" not in found.text
    assert "load_lora_weights('me/icons', weight_name='x.sft')\n" in code(found.text)


@pytest.mark.parametrize("base", ["mini", str(pipeline_dir())])
def test_the_miniature(tmp_path: Path, base: str) -> None:
    found = card(tmp_path, base_model=base, dataset="mini", instance_prompt="x")
    data = found.data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data
    assert "stable-diffusion-xl" not in data["tags"]
    assert "from_pretrained(pipeline_dir(), dtype=torch.float32)" in code(found.text)
    assert "trained on `bilora_diffusion's miniature`" in found.text
    assert str(pipeline_dir()) not in found.content


def test_local_paths_stay_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret" / "model").mkdir(parents=True)
    (tmp_path / "secret" / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for base, data in (
        (str(tmp_path / "secret" / "model"), str(tmp_path / "secret" / "data")),
        ("secret/model", "secret/data"),
    ):
        found = card(tmp_path, base_model=base, dataset=data, vae=base)
        assert "secret" not in found.content
        assert "from_pretrained('path/to/model'" in code(found.text)
        assert "base_model" not in found.data.to_dict()
        assert "datasets" not in found.data.to_dict()


def test_images_belong_to_the_folder_and_to_prompts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="subpath"):
        card(run, prompts=["a"], images=[tmp_path / "other.png"])
    with pytest.raises(ValueError, match="shorter"):
        card(run, prompts=["a", "b"], images=[run / "x.png"])
    assert not (run / "README.md").exists()


@settings(max_examples=25, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    folder = tmp_path_factory.mktemp("card")
    found = card(folder, prompts=[prompt], images=[folder / "a.png"], instance_prompt=prompt)
    assert found.data.to_dict()["widget"][0]["text"] == prompt
    assert found.data.to_dict()["instance_prompt"] == prompt
    if "```" not in prompt:
        assert f"pipeline({prompt!r})" in code(found.text)
