"""Short runs on the miniature, and comparisons of what they exported."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.run import runlog

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_dreambooth_bilora.py"
TEXT_SCRIPT = ROOT / "train_text_bilora.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ON_CPUS = {"ACCELERATE_USE_CPU": "true"}
"""Joins torchrun's processes on CPUs to one run."""


def flags(folder: Path, **values: Any) -> list[str]:
    """A short run on the miniature without held-out loss and images; True is a bare flag."""
    settings: dict[str, Any] = {
        "dataset": "mini",
        "validation_dataset": "none",
        "num_validation_images": 0,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "output_dir": folder,
        **values,
    }
    return words(settings)


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line: True is a bare flag, None leaves an option out."""
    argv: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv.append(str(value))
    return argv


def train(folder: Path, **values: Any) -> Path:
    """A run in this process; returns its folder."""
    from bilora_diffusion.image.script import train as run_script

    # accelerate keeps one precision for a whole process; each run here is to choose its own.
    AcceleratorState._reset_state()
    run_script(flags(folder, **values))
    return folder


def make_once(name: str, make: Callable[[Path], object], *facts: object) -> Path:
    """A folder made from these facts by the first who asks; all test files and workers read it."""
    key = hashlib.sha256(repr((name, *facts)).encode()).hexdigest()[:12]
    folder = Path(os.environ["HF_HOME"], "once", key)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder / name, ignore_errors=True)  # of a test that failed
            make(folder / name)
            (folder / "made").touch()
    return folder / name


def train_once(name: str = "run", /, **values: Any) -> Path:
    """A run with these flags that is shared: read it, or copy it (`copied`)."""
    return make_once(name, lambda folder: train(folder, **values), "image", sorted(values.items()))


def copied(run: Path, folder: Path) -> Path:
    """A copy of a shared run, to be changed."""
    return Path(shutil.copytree(run, folder))


def resumed(run: Path, step: int, **values: Any) -> Path:
    """A copy that goes on from one of the run's checkpoints; returns its folder."""
    parts = copied(run, run.with_name(f"{run.name}-parts"))
    checkpoint = parts / "checkpoints" / f"step-{step}"
    # What the copy holds of later steps is deleted.
    return train(parts, **values, resume_from_checkpoint=checkpoint, overwrite_output_dir=True)


def resumes_exactly(run: Path, step: int, **values: Any) -> None:
    """Assert that a copy resumed from one of the run's checkpoints ends as the run, to the bit."""
    assert_same_run(run, resumed(run, step, **values), "grad_norm")


def assert_same_run(left: Path, right: Path, *keys: str) -> None:
    """Assert that two runs are equal to the bit; ``keys`` are further columns of their metrics."""
    assert difference(left, right) == 0
    # The digest is a hash of a step's samples, noise and timesteps.
    for key in ("step", "loss", "digest", *keys):
        values = column(left, key)
        assert values, f"the metrics have no column {key}"
        assert values == column(right, key)


def run_python(
    words: Sequence[object], processes: int = 1, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` outside this process, by torchrun where it is to be several processes.

    It must end well.
    """
    command = [sys.executable]
    if processes > 1:
        command += [*TORCHRUN, str(processes)]
    command += map(str, words)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= environment or {}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result


def started(
    *words: object, environment: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> subprocess.Popen[str]:
    """``python WORDS``, begun in a process of its own with options of `subprocess.Popen`."""
    command = [sys.executable, *map(str, words)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, text=True, cwd=ROOT, env=variables, **options)


def error_sentence(output: str) -> str:
    """The one sentence that a command ends with, without a traceback."""
    assert "Traceback" not in output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return sentence


def file_contents(folder: Path) -> dict[str, bytes]:
    """Content of each file below a folder, by its path in it."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            contents[path.relative_to(folder).as_posix()] = path.read_bytes()
    return contents


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_icons(folder: Path) -> dict[str, Any]:
    """Flags for training on two icons of the miniature, measured on two others."""
    sources = {"dataset": mini.train_dir(), "validation_dataset": mini.heldout_dir()}
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": "mini",
        "instance_prompt": "a TOK icon",
    }
    for name, source in sources.items():
        (folder / name).mkdir(parents=True)
        for picture in sorted(source.glob("*.png"))[:2]:
            shutil.copy(picture, folder / name)
        values[name] = folder / name
    return values


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "model/model.safetensors",
    "adapter_model.safetensors",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run: of the adapter, or of the whole model."""
    files = [folder / name for name in WEIGHTS]
    return load_file(next(file for file in files if file.exists()))


def column(folder: Path, key: str) -> list[Any]:
    """One value of the run's metrics, at each step that has it."""
    return [row[key] for row in runlog.read_metrics(folder) if key in row]


def difference(a: Path, b: Path) -> float:
    """The largest difference between two runs' exported weights."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)


def best_and_stop_step(rows: Sequence[tuple[int, float | None]], patience: int) -> tuple[Any, Any]:
    """The step of the lowest held-out loss, and that at which the patience ended, or None.

    Step 0 is the base model.
    """
    lowest = float("inf")
    best_step = None
    measurements_since = 0
    for step, loss in rows:
        if step == 0:
            continue
        # A loss that is not finite is recorded as None, and is never the best.
        if loss is not None and loss < lowest:
            lowest = loss
            best_step = step
            measurements_since = 0
        else:
            measurements_since += 1
        if measurements_since == patience:
            return best_step, step
    return best_step, None


def interrupt(monkeypatch: Any, *numbers: int) -> list[int]:
    """Ctrl-C in these of all steps that are taken; returns the list of the steps taken."""
    from bilora_diffusion.train.trainer import Trainer

    steps_taken: list[int] = []
    train_step = Trainer.train_step

    def interrupted(self: Any, batches: Any) -> Any:
        steps_taken.append(self.step)
        if len(steps_taken) in numbers:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    return steps_taken
