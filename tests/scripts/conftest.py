"""What the tests of scores share: two short runs, and models that score in no time."""

from pathlib import Path

import pytest

from tests.scripts import runs

ROOT = runs.ROOT


@pytest.fixture(scope="module")
def scored_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps as `make demo` leaves them, under ``demo``."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "bilora"):
        # a rate at which two steps change the images visibly
        run = runs.train_once(method, method=method, learning_rate=3e-2)
        runs.copied(run, folder / "demo" / method)
    return folder


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a small random scorer and captioner of the real classes."""
    from tests.eval import clip_models

    folder = tmp_path_factory.mktemp("models")
    clip = clip_models.save_hf_clip(folder / "clip")
    blip = clip_models.save_blip(folder / "blip")
    return ["--scorer", f"hf:{clip}", "--captioner", f"blip:{blip}"]
