"""Every family of image models is in all places that CONTRIBUTING.md lists."""

from pathlib import Path

import pytest
import yaml

from bilora_diffusion.image.families import FAMILIES, SDXL, family_class
from docs.make import EXAMPLES
from docs.memory import MODELS, recipe_models
from tests.export.comfy_names import NAMES
from tests.image.test_layers import FEED_FORWARD
from tests.image.test_noise_levels import SOURCES
from tests.image.tiny import FILES

ROOT = Path(__file__).resolve().parents[2]
RECIPE_OF = {model: path.stem for path, model in recipe_models(EXAMPLES).items()}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_in_every_place(kind):
    family = family_class(kind, kind)
    recipes = [RECIPE_OF[model] for model in family.examples if model in RECIPE_OF]
    has_place = {
        "families/NAME.py: pipeline": family.pipeline == kind,
        "families/NAME.py: examples": bool(family.examples),
        # The embedded miniature is the tiny pipeline of SDXL.
        "tests/image/tiny/models.yaml": kind in FILES or kind == SDXL,
        "tests/image/test_layers.py: FEED_FORWARD": kind in FEED_FORWARD,
        "tests/image/test_noise_levels.py: SOURCES": kind in SOURCES or not family.flow,
        "results/dry_run_memory/models.json": set(family.examples) <= set(MODELS),
        "recipes/": bool(recipes),
        "README.md: names for --config": any(f"{name}`" in read("README.md") for name in recipes),
        "SCOPE.md": family.title in read("SCOPE.md"),
    }
    if family.comfyui is not None:
        sizes = yaml.safe_load(read("tests/export/comfyui.yaml"))
        has_place["tests/export/comfyui.yaml"] = kind in sizes
        # The keys of SDXL are those of kohya's format.
        names_layers = family.parts[family.denoiser] in NAMES or kind == SDXL
        has_place["tests/export/comfy_names.py: NAMES"] = names_layers
    missing = [place for place, is_there in has_place.items() if not is_there]
    assert not missing, f"add {kind} to {', '.join(missing)}"
