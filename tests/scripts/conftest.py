"""What the tests of whole runs share: training on the miniature as a person would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from tests.scripts.runs import flags

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_dreambooth_bilora.py"


@pytest.fixture
def train() -> Callable[..., Path]:
    """``train(folder, method="lora", max_train_steps=2)`` in this process; returns the folder."""
    from bilora_diffusion.image.script import main

    def run(folder: Path, **values: Any) -> Path:
        # accelerate keeps one precision for a whole process; each run here is to choose its own.
        AcceleratorState._reset_state()
        main(flags(folder, **values))
        return folder

    return run


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The script in a process of its own, optionally behind a launcher."""

    def run(
        argv: Sequence[str], launcher: Sequence[str] = (), timeout: float = 840
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), *argv],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="module")
def scored_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps as `make demo` leaves them, under ``demo``."""
    from bilora_diffusion.image.script import main

    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "bilora"):
        AcceleratorState._reset_state()
        # a rate at which two steps change the images visibly
        main(flags(folder / "demo" / method, method=method, learning_rate=3e-2))
    return folder


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a small random scorer and captioner of the real classes."""
    from tests.eval import clip_models

    folder = tmp_path_factory.mktemp("models")
    clip = clip_models.save_hf_clip(folder / "clip", clip_models.make_hf_clip())
    blip = clip_models.save_blip(folder / "blip")
    return ["--scorer", f"hf:{clip}", "--captioner", f"blip:{blip}"]
