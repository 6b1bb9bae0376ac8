"""Compare whole commands: diffusers' SDXL DreamBooth script and this project's.

    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py
    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py \\
        --model random_sdxl --resolution 256 --batch 1 --steps 69 --mixed_precision bf16 \\
        --variants bilora
    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py \\
        --device cuda --preset sdxl-1024 --json result.json

``--script`` is a copy of ``examples/dreambooth/train_dreambooth_lora_sdxl.py`` from the installed
version of diffusers. Both scripts train on the same folder of images with the same batch size,
rank, alpha, learning rate, initialization and layers, and write one LoRA file. In each round, every
process runs once, in rotating order: LoRA with diffusers' script, then the ``--variants`` of this
project. Each round has its own seed.

Steps are timed by their progress bars. Memory is the peak resident memory. On a GPU, which no other
process may use, the GPU's memory is measured too. The table also has the estimate of ``--dry_run``.
On the miniature the held-out loss is also measured. ``lora-again`` reads the latents that its first
round cached. The JSON file holds no paths of this machine except those in ``--peer_flags``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import (
    KIBI,
    GPUMemory,
    check,
    circumstances,
    finish,
    interleave,
    paired_ratio,
    watch_command,
)

from bilora_diffusion import mini
from bilora_diffusion.config.command_line import UserErrorParser
from bilora_diffusion.core.errors import TrainingError, UserError, run_cli
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.image.config import resolve as parse_run
from bilora_diffusion.image.script import DREAMBOOTH
from bilora_diffusion.run.record import read_metrics
from bilora_diffusion.train.engine import build_accelerator

OURS = str(Path(__file__).resolve().parents[1] / "train_dreambooth_bilora.py")
# Label of diffusers' script
PEER = "diffusers, LoRA"
# Run of this project -> its flags, in addition to those that all runs share
VARIANTS = {
    "lora": "--method lora",
    "lora-again": "--method lora --disk_cache auto",
    "bilora": "--method bilora",
    "bilora-fp16": "--method bilora --mixed_precision fp16",
    "bilora-nf4": "--method bilora --quantize nf4",
    "bilora-compile": "--method bilora --compile",
}
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {
        "model": str(mini.pipeline_dir()),
        "resolution": 64,
        "batch": 4,
        "steps": 200,
        "rounds": 5,
        "mixed_precision": "no",
        "variants": ["lora", "bilora"],
    },
    "sdxl-1024": {
        "model": "stabilityai/stable-diffusion-xl-base-1.0",
        "resolution": 1024,
        "batch": 1,
        "steps": 69,
        "rounds": 3,
        "mixed_precision": "bf16",
        "variants": list(VARIANTS),
    },
}
PROMPT = "a TOK icon, in the style of TOK"
RANK = 4
# State of a tqdm progress bar: steps done, total steps
STEP = re.compile(rb"(\d+)/(\d+) \[")
# Measurement of a round -> head of its column, and factor of its values there
FIGURES = {
    "seconds": ("whole command (s)", 1),
    "start": ("to the first step (s)", 1),
    "step": ("a step (s)", 1),
    "images_per_second": ("images/s", 1),
    "memory": ("memory (GB)", 1e-9),
    "gpu_memory": ("GPU memory (GB)", 1e-9),
    "estimate": ("by --dry_run (GB)", 1e-9),
    "skipped": ("steps skipped by fp16's scaler", 1),
    HELDOUT_LOSS: ("held-out loss x 1000", 1e3),
}
# Sentence that ``--dry_run`` prints: amount and unit
NEEDED = re.compile(r"the run needs about ([0-9.]+) (\w+)")
# Unit in that sentence -> bytes
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def command(
    label: str, folder: Path, seed: int, images: Path, args: argparse.Namespace
) -> list[str]:
    """Return the words after ``python`` for a variant, or for diffusers' script (`PEER`)."""
    shared = (
        f"--instance_data_dir {images} --rank {RANK}"
        f" --resolution {args.resolution} --train_batch_size {args.batch}"
        f" --max_train_steps {args.steps} --checkpointing_steps {args.steps + 1}"
        f" --mixed_precision {args.mixed_precision} --seed {seed} --output_dir {folder}"
        " --gradient_accumulation_steps 1 --learning_rate 1e-3 --lr_scheduler constant"
        " --lr_warmup_steps 0 --num_validation_images 0"
    )
    words = [str(args.script) if label == PEER else OURS]
    words += shared.split()
    words += ["--instance_prompt", PROMPT, "--pretrained_model_name_or_path", args.model]
    if label == PEER:
        return words + args.peer_flags
    # Like diffusers' script: alpha equals the rank, A is normal, one file is written, no cache.
    flags = f"--lora_alpha {RANK} --init_lora_weights gaussian --no_output_kohya_format"
    flags += f" --validation_dataset none --disk_cache no {VARIANTS[label]}"
    return words + flags.split()


def estimate(words: Sequence[str], environment: dict[str, str]) -> float:
    """Return the bytes that ``--dry_run`` estimates for a command of this project.

    Raises:
        TrainingError: The dry run failed.
    """
    dry_run = [sys.executable, *words, "--dry_run"]
    process = subprocess.run(dry_run, capture_output=True, text=True, env=environment, check=False)
    needed = NEEDED.search(process.stdout)
    if needed is None:
        raise TrainingError(f"--dry_run ended with {process.returncode}: {process.stderr[-500:]}")
    return float(needed[1]) * BYTES[needed[2]]


def run(
    words: Sequence[str], steps: int, log: Path, environment: dict[str, str]
) -> dict[str, float]:
    """Run a command that trains ``steps`` steps, and write its output to ``log``.

    Returns:
        Seconds: "seconds" of the whole process; "step", the median over all steps except the first;
        and "start", the time until the first step ended, minus "step". Bytes: "memory", and
        "gpu_memory" if the command may use a GPU.

    Raises:
        TrainingError: The command failed, or showed no progress bar of ``steps`` steps.
    """
    # The bar must show every step, however short.
    variables = {**environment, "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
    ticks = []
    gpu = None if environment.get("CUDA_VISIBLE_DEVICES") == "" else GPUMemory()
    began = time.perf_counter()
    with log.open("wb") as output, gpu or nullcontext():
        process: Any = subprocess.Popen(
            watch_command(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables
        )
        while block := os.read(process.stderr.fileno(), 2**16):
            # A block may hold several states of a bar.
            elapsed = time.perf_counter() - began
            output.write(block)
            for step, total in STEP.findall(block):
                ticks.append((int(step), int(total), elapsed))
        resident = process.stdout.read()
        exit_code = process.wait()
        total_seconds = time.perf_counter() - began
    if exit_code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last_lines = "\n".join(lines[-5:])
        raise TrainingError(f"{Path(words[0]).name} ended with {exit_code}:\n{last_lines}")
    ends = step_ends(ticks, steps)
    step_seconds = ends[0]
    if len(ends) > 1:
        step_seconds = statistics.median(later - end for end, later in itertools.pairwise(ends))
    # Compiling and warming up happen within the first step, and count as the start.
    measurements = {
        "seconds": total_seconds,
        "start": max(0.0, ends[0] - step_seconds),
        "step": step_seconds,
        "memory": int(resident) * KIBI,
    }
    if gpu is not None:
        measurements["gpu_memory"] = gpu.highest
    return measurements


def step_ends(ticks: Sequence[tuple[int, int, float]], steps: int) -> list[float]:
    """Return the seconds until each training step ended, from the states of all progress bars.

    Loading shows bars too. Among the bars with ``steps`` steps, the training's bar is the one that
    took longest.

    Args:
        ticks: (steps done, total steps, seconds since the start) of each state.
        steps: Number of training steps.
    """
    bars: list[dict[int, float]] = [{}]
    for step, total, elapsed in ticks:
        if total != steps:
            continue
        if step == 0:
            bars.append({})
        bars[-1].setdefault(step, elapsed)  # a bar may show a step several times
    bars = [bar for bar in bars if bar.get(steps)]
    if not bars:
        raise TrainingError(
            f"no progress bar of {steps} steps was shown: give diffusers' own script as --script."
        )
    longest = max(bars, key=lambda bar: bar[steps] - min(bar.values()))
    return [longest[step] for step in sorted(longest) if step > 0]


def heldout_loss(lora: Path) -> float:
    """Measure a LoRA's loss on held-out icons with the miniature, as this project's runs do."""
    words = "--dataset mini --mixed_precision no --report_to none --disk_cache no"
    words += " --num_validation_images 0 --output_dir"
    cfg = parse_run([*words.split(), str(lora / "grid")])
    task = DREAMBOOTH.build_task(cfg, build_accelerator(cfg))
    task.pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    assert task.grid is not None  # the miniature has held-out icons
    return task.grid()[HELDOUT_LOSS]


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all rounds and return the result; logs and runs are written below ``folder``."""
    images = folder / "images"
    shutil.copytree(mini.train_dir(), images, ignore=shutil.ignore_patterns("*.jsonl"))
    environment = dict(os.environ)
    # A model on this machine needs no hub. Offline, no process waits for the hub.
    if Path(args.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    measured: dict[str, list[dict[str, float]]] = {label: [] for label in (PEER, *args.variants)}
    # The dry runs come first, so that a variant that can't run is reported early.
    estimates = {}
    for name in args.variants:
        words = command(name, folder / "dry", 0, images, args)
        estimates[name] = estimate(words, environment)

    def work(label: str, number: int) -> float:
        run_folder = folder / f"{label.split(',')[0]}-{number}"
        words = command(label, run_folder, number, images, args)
        measurements = run(words, args.steps, folder / f"{run_folder.name}.log", environment)
        measurements["images_per_second"] = args.batch / measurements["step"]
        if args.model == PRESETS["mini"]["model"]:
            measurements[HELDOUT_LOSS] = heldout_loss(run_folder)
        if label != PEER:
            skipped = sum(row.get("skipped", False) for row in read_metrics(run_folder))
            measurements |= {"estimate": estimates[label], "skipped": skipped}
        measured[label].append(measurements)
        print(f"round {number + 1}, {label}: {measurements}", file=sys.stderr, flush=True)
        shutil.rmtree(run_folder)
        return measurements["seconds"]

    works = [partial(work, label) for label in measured]
    interleave(works, rounds=args.rounds, warmup=0)
    rows = {label: summary(rounds, measured[PEER]) for label, rounds in measured.items()}
    # Paths of this machine are left out, except those in --peer_flags.
    flags = dict(vars(args))
    del flags["json"]
    flags["script"] = args.script.name
    if Path(args.model).is_dir():
        flags["model"] = Path(args.model).name
    return {
        "variants": rows,
        "images": len(list(images.iterdir())),
        "rounds": args.rounds,
        "flags": flags,
        **circumstances(torch.device(args.device)),
    }


def summary(rounds: Sequence[Any], peer: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Compute a variant's medians, and paired ratios to the peer's with 95 % intervals."""
    row: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        values = [measurements[name] for measurements in rounds]
        row[name] = {"median": statistics.median(values), "values": values}
        if name in peer[0]:
            ratio, interval = paired_ratio(values, [measurements[name] for measurements in peer])
            row[name] |= {"ratio": ratio, "ratio_95": interval}
    return row


def table(result: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    rows = result["variants"]
    heads = [""]
    cells_by_label = {label: [label] for label in rows}
    for name, (title, factor) in FIGURES.items():
        if not any(name in row for row in rows.values()):
            continue
        heads.append(title)
        for label, row in rows.items():
            cells_by_label[label].append(_cell(row.get(name), factor, label))
    lines = []
    for cells in (heads, ["---"] * len(heads), *cells_by_label.values()):
        lines.append(f"| {' | '.join(cells)} |")
    flags = result["flags"]
    device = result["device"]
    lines += [
        "",
        f"{result['rounds']} rounds of {flags['steps']} steps of {flags['batch']} at"
        f" {flags['resolution']} px, {flags['mixed_precision']}; {device['cpu_model']},"
        f" {device['cpu_cores']} cores, torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines)


def _cell(figure: dict[str, Any] | None, factor: float, label: str) -> str:
    """Format a cell: the median, and for this project's runs the ratio to diffusers' script."""
    if figure is None:
        return ""
    text = f"{figure['median'] * factor:.2f}"
    if label == PEER or "ratio" not in figure:
        return text
    text += f", x {figure['ratio']:.2f}"
    if figure["ratio_95"]:
        low, high = figure["ratio_95"]
        text += f" ({low:.2f} to {high:.2f})"
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: The script, device, file or a count can't be used.
    """
    parser = UserErrorParser(description="Compare diffusers' script with this project's.")
    parser.add_argument("--script", type=Path, required=True, help="copy of diffusers' script")
    parser.add_argument(
        "--preset", choices=PRESETS, default="mini", help="defaults of the options below"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or hub id")
    for name in ("resolution", "batch", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        choices=VARIANTS,
        help="some of " + ", ".join(VARIANTS),
    )
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument(
        "--peer_flags", type=shlex.split, default=[], help="further flags for diffusers' script"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    # The command line is read twice: the preset sets the defaults of the other options.
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = parser.parse_args(argv)
    if not args.script.is_file():
        raise UserError(
            f"--script is {args.script}, which is not a file; give a copy of diffusers' script."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no GPU; give --device cpu.")
    check(args, "batch", "steps", "rounds")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the result to ``--json``."""
    args = parse(argv)
    with TemporaryDirectory() as folder:
        finish(benchmark(args, Path(folder)), table, args.json)


if __name__ == "__main__":
    sys.exit(run_cli(main))
