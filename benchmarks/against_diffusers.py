"""Whole commands side by side: diffusers' own SDXL DreamBooth script and this one.

    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py
    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py \\
        --model random_sdxl --resolution 256 --batch 1 --steps 69 --mixed_precision bf16 \\
        --variants bilora
    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py \\
        --device cuda --preset sdxl-1024 --json result.json

``--script`` is a copy of diffusers' ``examples/dreambooth/train_dreambooth_lora_sdxl.py`` of the
version that is installed. Both see the same folder of images, with the same batch, rank, alpha,
rate, start and layers, and write one LoRA file. Whole processes take turns, in rotating order:
LoRA there, and here what ``--variants`` names, a seed for each round. Steps are timed by their
progress bars. Memory is the highest resident one; that of a GPU, of which nobody else may use any,
stands beside what ``--dry_run`` says; on the miniature the held-out loss does. ``lora-again`` finds
what its first round left on disk. The JSON file holds no paths, so it can be posted.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import KIBI, GPUMemory, check, circumstances, finish, interleave, paired_ratio, watched

from bilora_diffusion import mini
from bilora_diffusion.config.command_line import Sentences
from bilora_diffusion.core.errors import TrainingError, UserError, run_cli
from bilora_diffusion.image.config import resolve as parse_run
from bilora_diffusion.image.script import DREAMBOOTH
from bilora_diffusion.run.record import read_metrics
from bilora_diffusion.train.engine import build_accelerator

OURS = str(Path(__file__).resolve().parents[1] / "train_dreambooth_bilora.py")
PEER = "diffusers, LoRA"
VARIANTS = {
    "lora": "--method lora",
    "lora-again": "--method lora --disk_cache auto",
    "bilora": "--method bilora",
    "bilora-sample": "--method bilora --auxiliaries sample --rho auto",
    "bilora-fp16": "--method bilora --mixed_precision fp16",
    "bilora-nf4": "--method bilora --quantize nf4",
    "bilora-compile": "--method bilora --compile",
}
"""Runs of this project: name -> flags, beside those that all runs share."""
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {
        **{"model": str(mini.pipeline_dir()), "resolution": 64, "batch": 4, "steps": 200},
        **{"rounds": 5, "mixed_precision": "no", "variants": ["lora", "bilora"]},
    },
    "sdxl-1024": {
        **{"model": "stabilityai/stable-diffusion-xl-base-1.0", "resolution": 1024, "batch": 1},
        **{"steps": 69, "rounds": 3, "mixed_precision": "bf16", "variants": list(VARIANTS)},
    },
}
PROMPT, RANK = "a TOK icon, in the style of TOK", 4
STEP = re.compile(rb"(\d+)/(\d+) \[")
FIGURES = {
    "seconds": ("whole command (s)", 1),
    "start": ("to the first step (s)", 1),
    "step": ("a step (s)", 1),
    "images_per_second": ("images/s", 1),
    "memory": ("memory (GB)", 1e-9),
    "gpu_memory": ("GPU memory (GB)", 1e-9),
    "estimate": ("by --dry_run (GB)", 1e-9),
    "skipped": ("steps left out by fp16's scaler", 1),
    "heldout_loss": ("held-out loss x 1000", 1e3),
}
"""Figure of a round -> its column, and its unit there."""
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
NEEDED = re.compile(r"the run needs about ([0-9.]+) (\w+)")


def command(
    label: str, folder: Path, seed: int, images: Path, args: argparse.Namespace
) -> list[str]:
    """Words after ``python`` of a variant's command line, or of diffusers' script (``PEER``)."""
    shared = (
        f"--instance_data_dir {images} --rank {RANK}"
        f" --resolution {args.resolution} --train_batch_size {args.batch}"
        f" --max_train_steps {args.steps} --checkpointing_steps {args.steps + 1}"
        f" --mixed_precision {args.mixed_precision} --seed {seed} --output_dir {folder}"
        " --gradient_accumulation_steps 1 --learning_rate 1e-3 --lr_scheduler constant"
        " --lr_warmup_steps 0 --num_validation_images 0"
    )
    words = [*shared.split(), "--instance_prompt", PROMPT]
    words += ["--pretrained_model_name_or_path", args.model]
    if label == PEER:
        return [str(args.script), *words, *args.peer_flags]
    ours = f"--lora_alpha {RANK} --init_lora_weights gaussian --no_output_kohya_format"
    ours += f" --validation_dataset none --disk_cache no {VARIANTS[label]}"
    return [OURS, *words, *ours.split()]


def estimate(words: Sequence[str], environment: dict[str, str]) -> float:
    """Bytes that ``--dry_run`` says a command of this project takes.

    Raises:
        TrainingError: it does not say.
    """
    dry = [sys.executable, *words, "--dry_run"]
    printed = subprocess.run(dry, capture_output=True, text=True, env=environment, check=False)
    needed = NEEDED.search(printed.stdout)
    if needed is None:
        raise TrainingError(f"--dry_run ended with {printed.returncode}: {printed.stderr[-500:]}")
    return float(needed[1]) * BYTES[needed[2]]


def run(
    words: Sequence[str], steps: int, log: Path, environment: dict[str, str]
) -> dict[str, float]:
    """Run a command of so many steps to its end, with its output in ``log``.

    Returns:
        "seconds" of the whole process, until its first step began ("start") and of a later step
        (the median), bytes of "memory", and of "gpu_memory" where the command may use a GPU.

    Raises:
        TrainingError: it failed, or showed no progress bar.
    """
    # Every step shows on the bar, however fast it is.
    bars = {**environment, "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
    began, ticks, pipe = time.perf_counter(), [], subprocess.PIPE
    gpu = None if environment.get("CUDA_VISIBLE_DEVICES") == "" else GPUMemory()
    with log.open("wb") as output, gpu or nullcontext():
        process: Any = subprocess.Popen(watched(words), stdout=pipe, stderr=pipe, env=bars)
        while block := os.read(process.stderr.fileno(), 2**16):
            # A block may hold several refreshes of a bar, which end in a carriage return.
            elapsed = time.perf_counter() - began
            output.write(block)
            for step, total in STEP.findall(block):
                ticks.append((int(step), int(total), elapsed))
        resident, ended = process.stdout.read(), process.wait()
        total_seconds = time.perf_counter() - began
    if ended:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise TrainingError(f"{Path(words[0]).name} ended with {ended}:\n" + "\n".join(last))
    ends = step_ends(ticks, steps)
    durations = [later - earlier for earlier, later in itertools.pairwise(ends)]
    # The first step compiles and warms up, so it counts for the start.
    step_seconds = statistics.median(durations) if durations else ends[0]
    figures = {
        "seconds": total_seconds,
        "start": max(0.0, ends[0] - step_seconds),
        "step": step_seconds,
        "memory": int(resident) * KIBI,
    }
    if gpu is not None:
        figures["gpu_memory"] = gpu.highest
    return figures


def step_ends(ticks: Sequence[tuple[int, int, float]], steps: int) -> list[float]:
    """When each step of the training ended, from all that progress bars showed.

    Loading shows bars too: the training's is, of those of so many steps, the one that took longest.

    Args:
        ticks: steps done, of how many, and when.
    """
    bars: list[dict[int, float]] = [{}]
    for step, total, elapsed in ticks:
        if total != steps:
            continue
        if step == 0:
            bars.append({})
        bars[-1].setdefault(step, elapsed)
    bars = [bar for bar in bars if bar.get(steps)]
    if not bars:
        raise TrainingError(f"no bar of {steps} steps is shown: give diffusers' own as --script.")
    # A bar of so many steps may be one of loading; training takes longer.
    longest = max(bars, key=lambda bar: bar[steps] - min(bar.values()))
    return [longest[step] for step in sorted(longest) if step > 0]


def heldout_loss(lora: Path) -> float:
    """Loss of a LoRA for the miniature on its unseen icons, on the grid of this project's runs."""
    words = "--dataset mini --mixed_precision no --report_to none --disk_cache no"
    words += " --num_validation_images 0 --output_dir"
    cfg = parse_run([*words.split(), str(lora / "grid")])
    task = DREAMBOOTH.build_task(cfg, build_accelerator(cfg))
    task.pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    assert task.grid is not None
    return task.grid()["heldout_loss"]


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that the command line asks for, with its logs and runs under ``folder``."""
    images = folder / "images"
    shutil.copytree(mini.train_dir(), images, ignore=shutil.ignore_patterns("*.jsonl"))
    environment = dict(os.environ)
    if Path(args.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    measured: dict[str, list[dict[str, float]]] = {label: [] for label in (PEER, *args.variants)}
    estimates = {}
    for name in args.variants:
        words = command(name, folder / "dry", 0, images, args)
        estimates[name] = estimate(words, environment)

    def work(label: str, number: int) -> float:
        out = folder / f"{label.split(',')[0]}-{number}"
        words = command(label, out, number, images, args)
        figures = run(words, args.steps, folder / f"{out.name}.log", environment)
        figures["images_per_second"] = args.batch / figures["step"]
        if args.model == PRESETS["mini"]["model"]:
            figures["heldout_loss"] = heldout_loss(out)
        if label != PEER:
            skipped = sum(row.get("skipped", False) for row in read_metrics(out))
            figures |= {"estimate": estimates[label], "skipped": skipped}
        measured[label].append(figures)
        print(f"round {number + 1}, {label}: {figures}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
        return figures["seconds"]

    works = [lambda number, label=label: work(label, number) for label in measured]
    interleave(works, rounds=args.rounds, warmup=0)
    rows = {label: summary(rounds, measured[PEER]) for label, rounds in measured.items()}
    flags = {k: v for k, v in vars(args).items() if k != "json"}  # without paths of this machine
    model = Path(args.model).name if Path(args.model).is_dir() else args.model
    flags |= {"model": model, "script": args.script.name}
    about = {"images": len(list(images.iterdir())), "rounds": args.rounds, "flags": flags}
    return {"arms": rows, **about, **circumstances(torch.device(args.device))}


def summary(rounds: Sequence[Any], peer: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Medians of a variant's figures, and their paired ratios to the peer's with 95 % intervals."""
    row: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        row[name] = {"median": statistics.median(values), "values": values}
        if name in peer[0]:
            ratio, interval = paired_ratio(values, [figures[name] for figures in peer])
            row[name] |= {"ratio": ratio, "ratio_95": interval}
    return row


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["arms"]
    columns = {k: v for k, v in FIGURES.items() if any(k in row for row in rows.values())}
    cells = [["", *(title for title, _ in columns.values())], ["---"] * (1 + len(columns))]
    for label, row in rows.items():
        figures = (_figure(row.get(name), unit, label) for name, (_, unit) in columns.items())
        cells.append([label, *figures])
    lines = [f"| {' | '.join(row)} |" for row in cells]
    flags, device = result["flags"], result["device"]
    lines += [
        "",
        f"{result['rounds']} rounds of {flags['steps']} steps of {flags['batch']} at"
        f" {flags['resolution']} px, {flags['mixed_precision']}; {device['cpu_model']},"
        f" {device['cpu_cores']} cores, torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines)


def _figure(cell: dict[str, Any] | None, unit: float, label: str) -> str:
    """A cell of the table: the median, and for all but the peer its ratio with the interval."""
    if cell is None:
        return ""
    text = f"{cell['median'] * unit:.2f}"
    if label == PEER or "ratio" not in cell:
        return text
    spread = cell["ratio_95"]
    interval = f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else ""
    return f"{text}, x {cell['ratio']:.2f}{interval}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings; refuses in one sentence what could not be measured or written."""
    parser = Sentences(description="diffusers' script and this one, side by side.")
    parser.add_argument("--script", type=Path, required=True, help="copy of diffusers' script")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="the options that follow")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or hub id")
    for name in ("resolution", "batch", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    variants: dict[str, Any] = {"nargs": "+", "metavar": "NAME", "choices": VARIANTS}
    parser.add_argument("--variants", **variants, help="some of " + ", ".join(VARIANTS))
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--peer_flags", type=shlex.split, default=[], help="for diffusers' script")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = parser.parse_args(argv)
    if not args.script.is_file():
        raise UserError(f"--script is {args.script}, which is not a file; give your copy of it.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no GPU; give --device cpu.")
    check(args, "batch", "steps", "rounds")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    args = parse(argv)
    with TemporaryDirectory() as folder:
        finish(benchmark(args, Path(folder)), table, args.json)


if __name__ == "__main__":
    sys.exit(run_cli(main))
