"""Short runs on the miniature, and comparisons of their results."""

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
"""Environment in which torchrun's processes train one run together on CPUs."""


def flags(folder: Path, **values: Any) -> list[str]:
    """Return flags for a short run on the miniature, by default without held-out loss and images.

    See `words` for the values.
    """
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
    """Return settings as a command line: True is a flag without a value, None omits the option."""
    argv: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv.append(str(value))
    return argv


def train(folder: Path, **values: Any) -> Path:
    """Train in this process and return the run's folder."""
    from bilora_diffusion.image.script import train as run_script

    # accelerate keeps one precision per process, but each run here chooses its own.
    AcceleratorState._reset_state()
    run_script(flags(folder, **values))
    return folder


def make_once(name: str, make: Callable[[Path], object], *facts: object) -> Path:
    """Return a folder that all test files and workers share; the first caller creates it.

    ``name`` and ``facts`` identify the folder.
    """
    key = hashlib.sha256(repr((name, *facts)).encode()).hexdigest()[:12]
    folder = Path(os.environ["HF_HOME"], "once", key)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder / name, ignore_errors=True)  # left by a failed test
            make(folder / name)
            (folder / "made").touch()
    return folder / name


def train_once(name: str = "run", /, **values: Any) -> Path:
    """Return a shared run with these flags; a test that changes the run must copy it (`copied`)."""
    return make_once(name, lambda folder: train(folder, **values), "image", sorted(values.items()))


def copied(run: Path, folder: Path) -> Path:
    """Copy a shared run for a test that changes it, and return the copy's folder."""
    return Path(shutil.copytree(run, folder))


def resumed(run: Path, step: int, **values: Any) -> Path:
    """Resume a copy of a run from one of its checkpoints, and return the copy's folder."""
    parts = copied(run, run.with_name(f"{run.name}-parts"))
    checkpoint = parts / "checkpoints" / f"step-{step}"
    # The copy's files of later steps are deleted.
    return train(parts, **values, resume_from_checkpoint=checkpoint, overwrite_output_dir=True)


def resumes_exactly(run: Path, step: int, **values: Any) -> None:
    """Assert that a copy resumed from a checkpoint ends bit-identical to the run."""
    assert_same_run(run, resumed(run, step, **values), "grad_norm")


def assert_same_run(left: Path, right: Path, *keys: str) -> None:
    """Assert that two runs are bit-identical; ``keys`` are further metrics to compare."""
    assert difference(left, right) == 0
    # The digest is a hash of a step's samples, noise and timesteps.
    for key in ("step", "loss", "digest", *keys):
        values = column(left, key)
        assert values, f"the metrics have no column {key}"
        assert values == column(right, key)


def run_python(
    words: Sequence[object], processes: int = 1, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` as a new process, and assert that it succeeds.

    torchrun starts it if there are several processes.
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
    """Start ``python WORDS`` as a new process; ``options`` are those of `subprocess.Popen`."""
    command = [sys.executable, *map(str, words)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, text=True, cwd=ROOT, env=variables, **options)


def error_sentence(output: str) -> str:
    """Return the only error message in a command's output, which must not have a traceback."""
    assert "Traceback" not in output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return sentence


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder, by its relative path."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            contents[path.relative_to(folder).as_posix()] = path.read_bytes()
    return contents


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_icons(folder: Path) -> dict[str, Any]:
    """Return flags for a run that trains on two icons of the miniature and measures two others."""
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
    """Return a run's exported weights, of the adapter or of the whole model."""
    files = [folder / name for name in WEIGHTS]
    return load_file(next(file for file in files if file.exists()))


def column(folder: Path, key: str) -> list[Any]:
    """Return one column of the run's metrics, from each row that has it."""
    return [row[key] for row in runlog.read_metrics(folder) if key in row]


def difference(a: Path, b: Path) -> float:
    """Return the largest absolute difference between two runs' exported weights."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)


def best_and_stop_step(rows: Sequence[tuple[int, float | None]], patience: int) -> tuple[Any, Any]:
    """Return the step of the lowest held-out loss, and the step at which early stopping ends a run.

    The second step is None if the run is not stopped. Step 0, the base model, does not count.
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
    """Send SIGINT in the training steps with these numbers, counted from 1 across runs.

    Return the list of the steps taken, which grows during training.
    """
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
