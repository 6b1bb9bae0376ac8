"""Model cards of image and text runs: front matter, code that runs, and no local paths."""

import ast
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.export.writer import save_models
from bilora_diffusion.image.card import write_dreambooth_card
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.script import write_text_card
from tests.export.export_models import write_lora
from tests.text.text_builders import SAVERS, rows_for, train_text, write_rows

pytestmark = pytest.mark.usefixtures("hub")

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
ICONS = f"--pretrained_model_name_or_path {SDXL} --dataset linoyts/3d_icon"
MINI = "--dataset mini"
FIXED_VAE = "madebyollin/sdxl-vae-fp16-fix"
VAE = f"--pretrained_vae_model_name_or_path {FIXED_VAE}"


def card(folder, flags, repo=None, results=None, **options):
    """Write and read the card of a run of 500 steps, with the images in its folder."""
    folder.mkdir(exist_ok=True)
    cfg = resolve(f"{flags} --mixed_precision no".split())
    cfg = dataclasses.replace(cfg, output_dir=str(folder), **options)
    write_dreambooth_card(cfg, folder, {"steps": 500, **(results or {})}, repo)
    return ModelCard.load(folder / "README.md")


def write_samples(folder, count):
    images = folder / "validation" / "step-500"
    images.mkdir(parents=True)
    for number in range(count):
        (images / f"{number:03d}.png").touch()


def blocks(text):
    """Return the Python blocks of a card; a block with invalid syntax raises SyntaxError."""
    parts = [part.split("\n```")[0] for part in text.split("```python\n")[1:]]
    for part in parts:
        ast.parse(part)
    return parts


def python_of(text):
    """Return the first Python block of a card."""
    return blocks(text)[0]


def test_a_card_has_front_matter_results_images_and_code(tmp_path):
    folder = tmp_path / "my run"
    frog = "a TOK icon of a frog: green"
    quoted = 'a "TOK" icon'
    write_samples(folder, 2)
    model_card = card(
        folder,
        f"{ICONS} --rho 0.05 --rank 4",
        results={"heldout_loss": 0.0812345678},
        validation_prompts=(frog, quoted),
    )
    data = model_card.data.to_dict()
    assert data["base_model"] == SDXL
    assert data["datasets"] == ["linoyts/3d_icon"]
    assert {"text-to-image", "lora", "template:sd-lora", "bilora"} <= set(data["tags"])
    assert data["instance_prompt"] == "a TOK icon, in the style of TOK"
    assert data["widget"] == [
        {"text": frog, "output": {"url": "validation/step-500/000.png"}},
        {"text": quoted, "output": {"url": "validation/step-500/001.png"}},
    ]
    for part in (
        "| method | Bi-LoRA |",
        "| held-out loss | 0.0812346 |",
        "`<lora:my run:1>`",
        "by its images, not by the held-out loss",  # the loss does not rank samples
    ):
        assert part in model_card.text
    assert "DoRA" not in model_card.text
    # The first version of ComfyUI that applies DoRA's magnitudes along the right axis.
    assert "0.3.30" in card(folder, f"{ICONS} --use_dora").text
    snippet = python_of(model_card.text)
    assert f"load_lora_weights('.', weight_name='{FILE_NAME}')" in snippet
    assert "image = pipeline('a TOK icon of a frog: green').images[0]" in snippet


def run(snippet, replaced=None):
    """Run a card's code on the miniature and the CPU, with two sampling steps instead of fifty."""
    snippet = snippet.replace('"cuda"', '"cpu"')
    snippet = snippet.replace(").images", ", num_inference_steps=2).images")
    for old, new in (replaced or {}).items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype.*")
        exec(snippet, {})  # the card's own code
    with Image.open("image.png") as image:
        assert image.size == (64, 64)
        assert np.asarray(image).std() > 1  # not of a single color
    Path("image.png").unlink()


@pytest.fixture(scope="module")
def pipeline():
    return DiffusionPipeline.from_pretrained(pipeline_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, pipeline):
    """Write a LoRA for the miniature in both formats, and return its folder."""
    folder = tmp_path_factory.mktemp("icons")
    write_lora(folder, pipeline, components=("unet", "text_encoder"), kohya=True)
    return folder


def test_the_code_for_sdxl_runs_in_its_precision(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(weights)  # the folder that the card calls "this folder"
    snippet = python_of(card(tmp_path, f"{ICONS} {VAE}").text)
    assert snippet.count("dtype=torch.float16") == 2
    model = pipeline_dir()
    run(snippet, {repr(SDXL): repr(str(model)), repr(FIXED_VAE): repr(str(model / "vae"))})


@pytest.mark.parametrize("source", ["base", 0.5])
def test_the_code_for_guidance_from_another_model_gives_the_sampler_s_images(
    source, tmp_path, pipeline, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path, pipeline, size=1.0)
    text = card(tmp_path, f"{MINI} --validation_prompt x --validation_guidance_from {source}").text
    prompt = "a ToK icon, in the style of ToK"
    settings = ", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images"
    names: dict[str, Any] = {}
    for block in blocks(text):
        exec(block.replace(").images", settings), names)
    assert len(blocks(text)[1].splitlines()) <= 12
    adapted = load_pipeline("mini", dtype=torch.float32)
    adapted.load_lora_weights(tmp_path, weight_name=FILE_NAME)
    pixels = [np.asarray(names["image"]).astype(int)]
    for guidance_from in (source, "adapter"):
        images = generate(adapted, [prompt], [3], size=64, steps=2, guidance_from=guidance_from)
        pixels.append(np.asarray(images[0]).astype(int))
    by_card, expected, by_adapter = pixels
    assert np.abs(by_card - expected).max() <= 1
    assert np.abs(by_card - by_adapter).max() > 4
    # These adapters can't be switched off within a call, so their cards have one block.
    assert len(blocks(card(tmp_path, f"{MINI} --use_dora").text)) == 1
    assert len(blocks(card(tmp_path, f"{MINI} --train_text_encoder").text)) == 1
    full = card(tmp_path, f"{MINI} --method full", results={"export": {"unet": None}})
    assert len(blocks(full.text)) == 1


def test_the_code_for_the_miniature_and_for_full_fine_tuning_runs(
    weights, tmp_path, monkeypatch, pipeline
):
    monkeypatch.chdir(weights)
    text = card(tmp_path, MINI).text
    run(python_of(text))
    # diffusers warns about SDXL's text encoders that have no adapters.
    assert "diffusers warns" in python_of(text)
    assert "diffusers warns" not in python_of(card(tmp_path, f"{MINI} --train_text_encoder").text)
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    save_models(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    run(python_of(card(tmp_path, f"{MINI} --method full", results={"export": models}).text))


def test_a_flow_model_s_card_loads_it_in_bf16_and_says_which_tools_read_dora(tmp_path):
    flow = f"{ICONS} --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev {VAE}"
    plain = card(tmp_path, flow, pipeline="FluxPipeline").text
    dora = card(tmp_path, f"{flow} --use_dora", pipeline="FluxPipeline").text
    for text in (plain, dora):
        assert python_of(text).count("torch.bfloat16") == 2
        assert "float16" not in python_of(text).replace("bfloat16", "")
    assert "diffusers warns" in python_of(plain)  # its loader also reads a text encoder's LoRA
    assert "models/loras" in plain
    assert "models/loras" not in dora
    assert "magnitudes" in dora


def test_a_card_omits_missing_facts(tmp_path):
    write_samples(tmp_path, 1)  # sampled with other settings, before a resume
    model_card = card(tmp_path, f"{MINI} --method lora", repo="me/icons", instance_prompt=None)
    data = model_card.data.to_dict()
    assert not {"instance_prompt", "widget", "license", "base_model", "datasets"} & set(data)
    assert "stable-diffusion-xl" not in data["tags"]
    for words in ("## Trigger", "## Results", "## Images", "models/loras", str(pipeline_dir())):
        assert words not in model_card.content
    assert f"load_lora_weights('me/icons', weight_name='{FILE_NAME}')\n" in python_of(
        model_card.text
    )


def test_local_paths_stay_private(tmp_path, monkeypatch):
    (tmp_path / "secret" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    places = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "dataset_name")
    for place in (str(tmp_path / "secret" / "model"), "secret/model"):
        model_card = card(tmp_path / "run", ICONS, **dict.fromkeys(places, place))
        assert "secret" not in model_card.content
        assert python_of(model_card.text).count("'path/to/model'") == 2
        assert not {"base_model", "datasets"} & set(model_card.data.to_dict())


@settings(max_examples=10, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_prompt_is_preserved(tmp_path_factory, prompt):
    folder = tmp_path_factory.mktemp("card")
    write_samples(folder, 1)
    options = {"validation_prompts": (prompt,), "instance_prompt": prompt}
    model_card = card(folder, ICONS, **options)
    assert model_card.data.to_dict()["widget"][0]["text"] == prompt
    assert model_card.data.to_dict()["instance_prompt"] == prompt
    if "```" not in prompt:
        assert f"pipeline({prompt!r})" in python_of(model_card.text)


def text_card(folder, kind, model, method="bilora", repo=None):
    flags = f"--model_name_or_path {model} --task_type {kind} --task sst2 --method {method}"
    results = {
        "steps": 30,
        "export": {
            "labels": ["negative", "positive"] if kind == "classification" else [],
            "layers": 3,
        },
        "heldout_loss": 0.123456789,
        "heldout_exact_match": 0.75,
    }
    write_text_card(resolve_text(flags.split()), folder, results, repo)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("kind", "model", "tag"),
    [
        ("causal", "meta-llama/Llama-3.1-8B", "text-generation"),
        ("classification", "FacebookAI/roberta-base", "text-classification"),
    ],
)
def test_a_text_card_has_front_matter_results_and_code(tmp_path, kind, model, tag):
    adapter = text_card(tmp_path, kind, model, repo="me/my-model")
    assert adapter.data.to_dict() == {
        "library_name": "peft",
        "base_model": model,
        "pipeline_tag": tag,
        "tags": ["bilora-diffusion", "bilora"],
    }
    snippet = python_of(adapter.text)
    for part in (model, "me/my-model", "PeftModel.from_pretrained(base"):
        assert part in snippet
    assert ("num_labels=2" in snippet) == (kind == "classification")
    for part in ("| exact match | 0.75 |", "0.123", "sst2"):
        assert part in adapter.text
    # Checkpoints and logs are not uploaded to the hub.
    assert "checkpoints" not in adapter.text
    full = text_card(tmp_path, kind, model, method="full")
    assert full.data.to_dict()["library_name"] == "transformers"
    assert 'subfolder="model"' in python_of(full.text)
    assert "| `model` | the result | no |" in full.text
    assert "PeftModel" not in python_of(full.text)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("causal", "bilora"),
        pytest.param("classification", "full", marks=pytest.mark.slow),
    ],
)
def test_the_code_of_a_text_card_loads_the_run(tmp_path, kind, method):
    base = SAVERS[kind](tmp_path / "my-base")
    run = train_text(
        tmp_path / "run",
        model_name_or_path=base,
        train_file=write_rows(tmp_path / "rows.jsonl", rows_for(kind, 8)),
        template="plain",
        max_train_steps=1,
        method=method,
    )
    text = (run / "README.md").read_text()
    assert "rows.jsonl" in text
    assert str(tmp_path) not in text  # local paths are reduced to their last part
    snippet = python_of(text)
    assert "path/to/this/folder" in snippet
    snippet = snippet.replace("path/to/this/folder", str(run))
    # An adapter needs its base; a fully fine-tuned model does not.
    assert ("path/to/my-base" in snippet) == (method == "bilora")
    snippet = snippet.replace("path/to/my-base", str(base))
    names: dict[str, Any] = {}
    exec(snippet, names)  # the card's own code
    tokens = names["tokenizer"]("hello there", return_tensors="pt")
    assert torch.isfinite(names["model"].eval()(**tokens).logits).all()
