"""Each family of image models is in the places that CONTRIBUTING.md lists."""

import json
from pathlib import Path

import pytest
import yaml

from bilora_diffusion.image.families import FAMILIES, SDXL, family_class
from docs.make import EXAMPLES
from docs.memory import MODELS, recipe_models
from tests.export.comfy_names import NAMES
from tests.image.test_layers import FEED_FORWARD
from tests.image.test_noise_levels import PUBLISHED, SOURCES
from tests.image.tiny import FILES

ROOT = Path(__file__).resolve().parents[2]
RECIPE_OF = {model: path.stem for path, model in recipe_models(EXAMPLES).items()}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def excerpt(name, start, end):
    """Return the part of a page between `start` and the next occurrence of `end`."""
    _, separator, text = read(name).partition(start)
    assert separator, f"{name} has no {start!r}"
    return text.partition(end)[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_in_each_place(kind):
    family = family_class(kind, kind)
    recipes = [RECIPE_OF[model] for model in family.examples if model in RECIPE_OF]
    has_place = {
        "families/NAME.py: pipeline": family.pipeline == kind,
        "families/NAME.py: examples": bool(family.examples),
        # The embedded miniature serves as SDXL's tiny pipeline.
        "tests/image/tiny/models.yaml": kind in FILES or kind == SDXL,
        "tests/image/test_layers.py: FEED_FORWARD": kind in FEED_FORWARD,
        "tests/image/test_noise_levels.py: SOURCES": kind in SOURCES or not family.flow,
        "tests/image/test_noise_levels.py: PUBLISHED": kind in PUBLISHED or not family.flow,
        "results/dry_run_memory/models.json": set(family.examples) <= set(MODELS),
        "recipes/": bool(recipes),
        "README.md: names for --config": any(f"{name}`" in read("README.md") for name in recipes),
        "SCOPE.md": family.title in read("SCOPE.md"),
    }
    if family.flow:
        noise_levels = excerpt("docs/models.md", "| model | in training at 512", "\n\n")
        has_place["docs/models.md: noise levels"] = f"\n| {family.title}" in noise_levels
    if not family.reads_negative_prompt:
        row = excerpt("docs/guide.md", "\n| `--n` |", "\n")
        has_place["docs/guide.md: `--n`"] = family.title in row
    scripts = json.loads(read("tests/references/diffusers_flags.json"))["scripts"]
    if FAMILIES[kind][0] in scripts and kind != SDXL:
        sentence = excerpt("docs/guide.md", "and most of those for", "For the same LoRA")
        has_place["docs/guide.md: diffusers' scripts"] = family.title in sentence
    if family.comfyui is None:
        notes = excerpt("docs/files.md", "- **Other layers**", "no workflow is written")
        has_place["docs/files.md: models that ComfyUI does not read"] = family.title in notes
    else:
        sizes = yaml.safe_load(read("tests/export/comfyui.yaml"))
        has_place["tests/export/comfyui.yaml"] = kind in sizes
        # SDXL's keys are those of kohya's format.
        names_layers = family.parts[family.denoiser] in NAMES or kind == SDXL
        has_place["tests/export/comfy_names.py: NAMES"] = names_layers
    missing = [place for place, is_there in has_place.items() if not is_there]
    assert not missing, f"add {kind} to {', '.join(missing)}"
