"""How near ``--dry_run`` comes to the memory that a run takes, and what each image model takes.

    python benchmarks/dry_run_memory.py train_dreambooth_bilora.py --config recipes/mini.yaml \\
        --max_train_steps 3 --output_dir out                     # estimate, measurement and ratio
    python benchmarks/dry_run_memory.py --table table.json       # all models at 1024 px
    python benchmarks/dry_run_memory.py --table table.json --models "FLUX.1-dev"

The first runs the command line twice, dry and in earnest, and measures the highest resident memory
of the second: on a CPU, where that is what counts. The others read no weights and need no GPU;
models that the file has already are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from full_models import MODELS, FullModel
from measure import KIBI, circumstances, watched

from bilora_diffusion.adapters import AdapterSpec, weightless
from bilora_diffusion.adapters.quantize import KEPT, quantize
from bilora_diffusion.durable import bytes_for_people, write_text
from bilora_diffusion.errors import TrainingError, UserError, run_cli
from bilora_diffusion.image.config import parse
from bilora_diffusion.image.denoising import Denoising, DreamBoothModule
from bilora_diffusion.image.flow import FlowMatching
from bilora_diffusion.methods import Target
from bilora_diffusion.train import dry_run
from bilora_diffusion.train.estimate import TRAINING
from bilora_diffusion.train.memory import Ledger, tensors_of
from bilora_diffusion.train.running import build_accelerator
from bilora_diffusion.train.task import MicroBatch

SCRIPTS = {"train_dreambooth_bilora.py": ["--disk_cache", "no"], "train_text_bilora.py": []}
"""Each with what makes it encode all that it needs, as a first run does."""
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
METHODS, PRECISIONS, SIDE = ("lora", "bilora"), ("bf16", "nf4"), 1024


def compare(words: Sequence[str]) -> dict[str, Any]:
    """A command line's estimate and the peak resident memory of its process, in bytes.

    Raises:
        UserError: no training script is named, or bad input.
        TrainingError: the run failed.
    """
    if words[0] not in SCRIPTS:
        raise UserError(f"{words[0]} is no training script: name one of {', '.join(SCRIPTS)}.")
    estimate, measured = estimated(words), measured_of(words)
    return {
        "command": " ".join(Path(w).name if Path(w).is_absolute() else w for w in words),
        "estimated_bytes": estimate,
        "measured_bytes": measured,
        "ratio": estimate / measured,
        **circumstances(torch.device("cpu")),
    }


def estimated(words: Sequence[str]) -> int:
    """Bytes that a dry run says, to three digits, in a process of its own as a user has it."""
    done = subprocess.run(
        [sys.executable, *words, "--dry_run"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise TrainingError(f"the dry run ended with {done.returncode}: {done.stderr}")
    found = re.search(r"the run needs about ([\d.]+) (bytes|kB|MB|GB|TB),", done.stdout)
    assert found is not None, done.stdout
    return round(float(found[1]) * UNITS[found[2]])


def measured_of(words: Sequence[str]) -> int:
    """Bytes of the highest resident memory of a run, in a process of its own."""
    done = subprocess.run(
        watched([*words, *SCRIPTS[words[0]]]), check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise TrainingError(f"the run ended with {done.returncode}: see above.")
    return int(done.stdout) * KIBI


def step_of(
    model: FullModel, method: str, precision: str, *, checkpointing: bool = True, batch: int = 1
) -> tuple[int, int]:
    """Bytes of a training step at its peak, and of the activations that it keeps for backward."""
    with TemporaryDirectory() as folder:
        words = ["--dataset", "mini", "--validation_dataset=none", "--num_validation_images=0"]
        words += ["--method", method, "--mixed_precision", "bf16", "--report_to", "none"]
        cfg = parse([*words, "--output_dir", folder, "--train_batch_size", str(batch), "--dry_run"])
    accelerator, ledger = build_accelerator(cfg), Ledger()
    task = _task(model, replace(cfg, resolution=SIDE), precision, checkpointing)
    names = tuple(str(n) for n in range(batch))
    once = [MicroBatch(tuple(range(batch)), names, names, model.inputs(batch, SIDE))]
    rehearsal: Any = SimpleNamespace(task=task, parts=task.models, batches=lambda *_: once)
    dry_run.trained(rehearsal, accelerator, ledger)
    phase = next(phase for phase in ledger.phases if phase.name == TRAINING)
    return phase.peaks["cpu"].total, phase.activations


def _task(model: FullModel, cfg: Any, precision: str, checkpointing: bool) -> Any:
    """What `Trainer` needs of a task: the denoiser with its loss."""
    family = model.family
    denoiser: Any = weightless.weightless(model.denoiser, torch.bfloat16)
    if precision == "nf4":
        quantize(denoiser, torch.bfloat16, KEPT)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    steps = {"num_train_timesteps": 1000}
    schedule = (
        FlowMatching.from_config(steps, None) if family.flow else Denoising.from_config(steps)
    )
    spec = AdapterSpec(rank=cfg.rank, alpha=cfg.lora_alpha, target_modules=family.targets)
    return SimpleNamespace(
        cfg=cfg,
        module=DreamBoothModule(family, denoiser, [], schedule),
        models={family.denoiser: denoiser},
        num_samples=1,
        sample_names=[""],
        targets=lambda: [Target(family.denoiser, denoiser, spec, cfg.learning_rate)],
    )


def encoders_of(model: FullModel, precision: str) -> int:
    """Bytes of the text encoders' weights, which are on the device before the denoiser is."""
    total = 0
    for build in model.encoders:
        encoder = weightless.weightless(build, torch.bfloat16)
        if precision == "nf4" and model.family.flow:
            quantize(encoder, torch.bfloat16)
        total += sum(tensor.nbytes for tensor in tensors_of(encoder))
    return total


def table(file: Path, models: Sequence[str]) -> None:
    """Write what each model takes into a JSON file, model by model."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in models:
        for precision in PRECISIONS:
            key = f"{name}, {precision}"
            if key in known:
                continue
            row: dict[str, Any] = {"encoders": encoders_of(MODELS[name], precision)}
            for method in METHODS:
                peak, activations = step_of(MODELS[name], method, precision)
                row |= {method: peak, "activations": activations}
            known[key] = row
            write_text(file, json.dumps(known, indent=2) + "\n")
            print(key, {k: bytes_for_people(v) for k, v in row.items()}, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare a command line, or make the table."""
    parser = argparse.ArgumentParser(description="Memory by --dry_run, and as measured.")
    parser.add_argument("--table", type=Path, help="JSON file for what each model takes at 1024 px")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path, help="also write the comparison to this file")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a training script and its flags")
    args = parser.parse_args(argv)
    if args.table:
        return table(args.table, args.models)
    if not args.command:
        raise UserError("nothing is asked for: give a training script with its flags, or --table.")
    result = compare(args.command)
    print(json.dumps({k: result[k] for k in ("estimated_bytes", "measured_bytes", "ratio")}))
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(run_cli(main))
