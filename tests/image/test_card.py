"""The model card: front matter the hub reads, code that runs, and nothing of this machine."""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
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
from bilora_diffusion.image.card import write_dreambooth_card
from bilora_diffusion.image.config import parse
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run.publish import NOT_UPLOADED
from tests.export.mini_loras import write_lora

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
ICONS = ["--pretrained_model_name_or_path", SDXL, "--dataset", "linoyts/3d_icon"]
MINI = ["--dataset", "mini"]
VAE = ["--pretrained_vae_model_name_or_path", "madebyollin/sdxl-vae-fp16-fix"]


def card(
    folder: Path,
    flags: Sequence[str],
    repo: str | None = None,
    results: Mapping[str, Any] | None = None,
    **options: Any,
) -> ModelCard:
    """The card of a run of 500 steps, with whatever images lie in its folder."""
    folder.mkdir(exist_ok=True)
    cfg = parse([*flags, "--output_dir", str(folder), "--mixed_precision", "no"])
    cfg = dataclasses.replace(cfg, **options)
    write_dreambooth_card(cfg, folder, {"steps": 500, **(results or {})}, repo)
    return ModelCard.load(folder / "README.md")


def sampled(folder: Path, count: int) -> None:
    images = folder / "validation" / "step-500"
    images.mkdir(parents=True)
    for number in range(count):
        (images / f"{number}.png").touch()


def code(text: str) -> str:
    """The Python block of a card; raises when it is not Python."""
    start = text.index("```python\n") + len("```python\n")
    block = text[start : text.index("\n```", start)]
    ast.parse(block)
    return block


def test_a_full_card(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "my run", ("a TOK icon of a frog: green", 'a "TOK" icon')
    sampled(folder, 2)
    found = card(
        folder,
        [*ICONS, "--rho", "0.05", "--rank", "4"],
        results={"heldout_loss": 0.0812345678},
        validation_prompts=prompts,
    )
    data = found.data.to_dict()
    assert data["base_model"] == SDXL
    assert data["datasets"] == ["linoyts/3d_icon"]
    assert {"text-to-image", "lora", "template:sd-lora", "bilora"} <= set(data["tags"])
    assert data["instance_prompt"] == "a TOK icon, in the style of TOK"
    urls = [f"validation/step-500/{number}.png" for number in (0, 1)]
    assert data["widget"] == [
        {"text": prompt, "output": {"url": url}} for prompt, url in zip(prompts, urls, strict=True)
    ]
    text = found.text
    assert "# stabilityai/stable-diffusion-xl-base-1.0 fine-tuned with Bi-LoRA" in text
    assert "Use `a TOK icon, in the style of TOK` in the prompt." in text
    for row in (
        "| method | Bi-LoRA |",
        "| rank | 4 |",
        "| rho | 0.05 |",
        "| seed | 0 |",
    ):
        assert row in text
    assert "| held-out loss | 0.0812346 |" in text
    assert f"![a TOK icon of a frog: green]({urls[0]})" in text
    snippet = code(text)
    assert f"load_lora_weights('.', weight_name='{FILE_NAME}')" in snippet
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
    with Image.open("image.png") as image:
        assert image.size == (64, 64)
        assert np.asarray(image).std() > 1  # neither black nor grey
    Path("image.png").unlink()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return DiffusionPipeline.from_pretrained(pipeline_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, pipeline: Any) -> Path:
    """A folder with a LoRA for the miniature in both formats."""
    folder = tmp_path_factory.mktemp("icons")
    write_lora(folder, pipeline, components=("unet", "text_encoder"), kohya=True)
    return folder


def test_the_code_for_sdxl_runs_in_its_precision(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights)  # "this folder"
    snippet = code(card(tmp_path, [*ICONS, *VAE]).text)
    assert snippet.count("dtype=torch.float16") == 2
    places = {SDXL: pipeline_dir(), VAE[1]: pipeline_dir() / "vae"}
    run(snippet, {repr(name): repr(str(place)) for name, place in places.items()})


def test_the_code_for_the_miniature_and_for_whole_models_runs(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    monkeypatch.chdir(weights)
    run(code(card(tmp_path, MINI).text))
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    save_models(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    run(code(card(tmp_path, [*MINI, "--method", "full"], results={"export": models}).text))


def test_the_upload_has_both_files_and_no_other_of_their_name(weights: Path) -> None:
    export = "exports/step-100/pytorch_lora_weights.safetensors"  # diffusers might take it instead
    files = [*(path.name for path in weights.glob("*.safetensors")), export, "checkpoints/a"]
    uploaded = set(filter_repo_objects(files, ignore_patterns=NOT_UPLOADED))
    assert uploaded == {FILE_NAME, kohya_file_name(weights)}


def test_where_to_put_which_file(tmp_path: Path) -> None:
    folder = tmp_path / "my icons"
    text = card(folder, ICONS).text
    for part in ("`my icons.safetensors` into `models/loras`", "`<lora:my icons:1>`"):
        assert part in text
    assert "DoRA" not in text
    dora = card(folder, [*ICONS, "--use_dora"]).text
    assert "0.3.30" in dora
    assert "A1111" in dora
    assert "--to kohya" in card(folder, [*ICONS, "--no_output_kohya_format"]).text
    whole = card(folder, [*ICONS, "--method", "full"], results={"export": ["unet"]}).text
    assert "ComfyUI" not in whole
    assert "models/loras" not in card(folder, MINI).text  # only this package knows the miniature


def test_only_what_is_given_is_said(tmp_path: Path) -> None:
    sampled(tmp_path, 1)  # of another setting, before a resume
    found = card(tmp_path, [*ICONS, "--method", "lora"], repo="me/icons", instance_prompt=None)
    assert not {"instance_prompt", "widget", "license"} & set(found.data.to_dict())
    assert found.data.to_dict()["tags"].count("lora") == 1
    for heading in ("Trigger", "Results", "Images"):
        assert f"## {heading}" not in found.text
    assert f"load_lora_weights('me/icons', weight_name='{FILE_NAME}')\n" in code(found.text)


@pytest.mark.parametrize("base", ["mini", str(pipeline_dir())])
def test_the_miniature_is_named_as_nothing_else(tmp_path: Path, base: str) -> None:
    found = card(tmp_path, [*MINI, "--pretrained_model_name_or_path", base])
    data = found.data.to_dict()
    assert not {"base_model", "datasets"} & set(data)
    assert "stable-diffusion-xl" not in data["tags"]
    assert "trained on `bilora_diffusion's miniature`" in found.text
    assert str(pipeline_dir()) not in found.content


def test_local_paths_stay_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "data"):
        (tmp_path / "secret" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "secret", Path("secret")):
        found = card(
            tmp_path / "run",
            ICONS,
            pretrained_model_name_or_path=str(place / "model"),
            pretrained_vae_model_name_or_path=str(place / "model"),
            dataset_name=str(place / "data"),
        )
        assert "secret" not in found.content
        assert code(found.text).count("'path/to/model'") == 2
        assert not {"base_model", "datasets"} & set(found.data.to_dict())


@settings(max_examples=10, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    folder = tmp_path_factory.mktemp("card")
    sampled(folder, 1)
    options = {"validation_prompts": (prompt,), "instance_prompt": prompt}
    found = card(folder, ICONS, **options)
    assert found.data.to_dict()["widget"][0]["text"] == prompt
    assert found.data.to_dict()["instance_prompt"] == prompt
    if "```" not in prompt:
        assert f"pipeline({prompt!r})" in code(found.text)
